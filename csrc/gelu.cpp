#include "gelu.h"

#include <algorithm>
#include <stdexcept>

#include <omp.h>

#include "gelu_loop.h"

namespace dcar {
namespace {

// Below this many numbers starting threads costs more than it saves.
constexpr int64_t kNumbersPerThread = 1 << 15;

const GeluLoop& loop_for(const std::string& isa) {
#ifdef DCAR_FAST_X86
  if (isa == "avx512") return kGeluAvx512;
  if (isa == "avx2") return kGeluAvx2;
#endif
  if (isa == "generic") return kGeluGeneric;
  throw std::invalid_argument("no gelu for the instruction set " + isa);
}

}  // namespace

void gelu(const void* x, void* out, int64_t count, FloatType type, int num_threads, const std::string& isa) {
  const GeluLoop& loop = loop_for(isa);
  const int64_t useful = std::max<int64_t>(1, count / kNumbersPerThread);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, useful));
  // Whole cache lines for each thread.
  const int64_t share = ((count + threads - 1) / threads + 31) / 32 * 32;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    const int64_t first = std::min(count, part * share), size = std::min(count - first, share);
    if (type == FloatType::kFloat32)
      loop.float32(static_cast<const float*>(x) + first, static_cast<float*>(out) + first, size);
    else
      loop.bfloat16(static_cast<const uint16_t*>(x) + first, static_cast<uint16_t*>(out) + first, size);
  }
}

}  // namespace dcar
