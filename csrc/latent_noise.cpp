#include "latent_noise.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include <omp.h>

#include "latent_block.h"
#include "philox.h"

namespace dcar {
namespace {

constexpr int64_t kBlocksPerThread = 64;  // below, starting threads costs more than it saves

LatentBlockKernel kernel_for(const std::string& isa) {
#ifdef DCAR_FAST_X86
  if (isa == "avx512") return kLatentNoiseAvx512;
  if (isa == "avx2") return kLatentNoiseAvx2;
#endif
  if (isa == "generic") return kLatentNoiseGeneric;
  throw std::invalid_argument("no latent_noise for the instruction set " + isa);
}

void check(const char* name, int64_t row, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(value) + " at " + std::to_string(row) +
                                ", allowed are 0.." + std::to_string(most));
}

// Counters `first` to `end`, at most a block of them, counted row by row.
void run_block(const LatentNoise& task, int64_t quads, int64_t first, int64_t end, LatentBlockKernel kernel) {
  LatentCounters counters{};
  counters.step = task.step;
  counters.stream = task.initial ? kStreamLatentInit : kStreamLatent;
  int64_t row = first / quads, quad = first % quads;
  for (int64_t i = 0; i < end - first; ++i) {
    const uint64_t seed = static_cast<uint64_t>(task.seeds[row]);
    counters.quad[i] = static_cast<uint32_t>(quad);
    counters.token[i] = static_cast<uint32_t>(task.tokens[row]);
    counters.key0[i] = static_cast<uint32_t>(seed);
    counters.key1[i] = static_cast<uint32_t>(seed >> 32);
    if (++quad == quads) quad = 0, ++row;
  }
  float normals[4 * kLatentBlock];
  kernel(counters, normals);
  if (task.channels % 4 == 0) {  // no number is left over: what a block makes lies side by side
    std::copy_n(normals, 4 * (end - first), task.out + 4 * first);
    return;
  }
  row = first / quads, quad = first % quads;
  for (int64_t i = 0; i < end - first; ++i) {
    const int64_t count = std::min<int64_t>(4, task.channels - 4 * quad);
    std::copy_n(normals + 4 * i, count, task.out + row * task.channels + 4 * quad);
    if (++quad == quads) quad = 0, ++row;
  }
}

}  // namespace

void latent_noise(const LatentNoise& task, int num_threads, const std::string& isa) {
  const LatentBlockKernel kernel = kernel_for(isa);
  for (int64_t row = 0; row < task.rows; ++row) {
    check("seeds", row, task.seeds[row], std::numeric_limits<int64_t>::max());
    check("tokens", row, task.tokens[row], std::numeric_limits<uint32_t>::max());
  }
  const int64_t quads = (task.channels + 3) / 4, total = task.rows * quads;
  const int64_t blocks = (total + kLatentBlock - 1) / kLatentBlock;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, std::max<int64_t>(1, blocks / kBlocksPerThread)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block)
    run_block(task, quads, block * kLatentBlock, std::min(total, (block + 1) * kLatentBlock), kernel);
}

}  // namespace dcar
