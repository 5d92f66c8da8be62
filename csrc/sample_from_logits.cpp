#include "sample_from_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include <omp.h>

#include "philox.h"
#include "sample_scan.h"

namespace dcar {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

const SampleScanKernel& scan_kernel(const std::string& isa) {
#ifdef DCAR_FAST_X86
  if (isa == "avx512") return kSampleScanAvx512;
  if (isa == "avx2") return kSampleScanAvx2;
#endif
  if (isa == "generic") return kSampleScanGeneric;
  throw std::invalid_argument("no sample_from_logits kernel for the instruction set " + isa);
}

// -log(-log u) with the reference's clamps, which change nothing for counter noise.
float gumbel(float u) {
  const double exponential = -std::log(static_cast<double>(std::max(u, 1e-20f)));
  return static_cast<float>(-std::log(std::max(exponential, 1e-20)));
}

struct Best {
  float score = -kInfinity;
  int64_t id = 0;
  float logit = -kInfinity;
};

// What a thread works in: one row of guided logits, and what may win in one chunk.
struct Workspace {
  std::vector<float> x, chunk_largest;
  std::vector<float> uniforms = std::vector<float>(kSampleChunk, 0.5f);
  std::vector<Survivor> found = std::vector<Survivor>(kSampleChunk);

  explicit Workspace(int64_t chunks) : x(chunks * kSampleChunk), chunk_largest(chunks) {}
};

class RowSampler {
 public:
  RowSampler(const SampleArguments& arguments, const SampleScanKernel& kernel, int64_t row, Workspace& workspace)
      : a_(arguments), kernel_(kernel), w_(workspace) {
    noise_.kind = a_.tau == 0 ? SampleRow::kNoNoise : a_.uniforms ? SampleRow::kUniforms : SampleRow::kCounter;
    noise_.inverse_temperature = 1.0f / a_.softmax_temperature;
    noise_.tau = a_.tau;
    if (noise_.kind == SampleRow::kCounter) {
      const uint64_t seed = static_cast<uint64_t>(a_.seeds[row]);
      noise_.key0 = static_cast<uint32_t>(seed);
      noise_.key1 = static_cast<uint32_t>(seed >> 32);
      noise_.token = static_cast<uint32_t>(a_.tokens[row]);
      noise_.step = a_.step;
    }
    if (noise_.kind == SampleRow::kUniforms) uniforms_ = a_.uniforms + row * a_.columns;
    guide(row);
  }

  Best run() {
    const int64_t chunks = static_cast<int64_t>(w_.chunk_largest.size());
    // The largest logit first: its score is a threshold that few others reach.
    const int64_t top = std::max_element(w_.chunk_largest.begin(), w_.chunk_largest.end()) - w_.chunk_largest.begin();
    if (w_.chunk_largest[top] == -kInfinity) return best_;
    const float* chunk = w_.x.data() + top * kSampleChunk;
    consider(top * kSampleChunk + (std::find(chunk, chunk + kSampleChunk, w_.chunk_largest[top]) - chunk));
    for (int64_t c = 0; c < chunks; ++c)
      if (w_.chunk_largest[c] != -kInfinity) scan(c * kSampleChunk);
    return best_;
  }

 private:
  void guide(int64_t row) {
    const int64_t cond = row * a_.cond_stride, uncond = row * a_.uncond_stride;
    float *x = w_.x.data(), *largest = w_.chunk_largest.data();
    if (a_.type == LogitType::kFloat32) {
      const auto *c = static_cast<const float*>(a_.cond), *u = static_cast<const float*>(a_.uncond);
      kernel_.guide_float(c + cond, u ? u + uncond : nullptr, a_.columns, a_.guidance, x, largest);
    } else {
      const auto *c = static_cast<const uint16_t*>(a_.cond), *u = static_cast<const uint16_t*>(a_.uncond);
      kernel_.guide_bfloat16(c + cond, u ? u + uncond : nullptr, a_.columns, a_.guidance, x, largest);
    }
  }

  // Below it no bound can belong to a winner: logit * inverse_temperature is off by some 1e-7 of the logit, which is at
  // most |best| + 100 tau where that matters, or by less than the smallest normal number.
  float threshold() const {
    if (!(noise_.inverse_temperature <= std::numeric_limits<float>::max())) return -kInfinity;  // 1 / 1e-39
    // Noise this small has no bound that float32 could hold; a logit that overflows may have one that does not.
    if (noise_.kind != SampleRow::kNoNoise && a_.tau < 1e-30f) return -kInfinity;
    if (std::isinf(best_.score)) return best_.score < 0 ? best_.score : 0.99f * std::numeric_limits<float>::max();
    return best_.score - (std::fabs(best_.score) + 100 * a_.tau) * 1e-6f - 1e-37f;
  }

  void scan(int64_t first) {
    const float* uniforms = nullptr;
    if (uniforms_ != nullptr) {
      uniforms = uniforms_ + first;
      if (a_.columns - first < kSampleChunk) {  // nothing is read beyond the last column
        std::copy(uniforms, uniforms_ + a_.columns, w_.uniforms.begin());
        uniforms = w_.uniforms.data();
      }
    }
    float least = threshold();
    const int count = kernel_.survivors(w_.x.data() + first, first, uniforms, noise_, least, w_.found.data());
    if (count == 0) return;
    // The most promising first, which spares most of the others.
    const auto by_bound = [](const Survivor& a, const Survivor& b) { return a.bound < b.bound; };
    const Survivor* promising = std::max_element(w_.found.data(), w_.found.data() + count, by_bound);
    consider(first + promising->place, promising->word);
    least = threshold();
    for (int i = 0; i < count; ++i)
      if (!(w_.found[i].bound < least)) {
        consider(first + w_.found[i].place, w_.found[i].word);
        least = threshold();
      }
  }

  void consider(int64_t id) {
    uint32_t word = 0;
    if (noise_.kind == SampleRow::kCounter) {
      const PhiloxWords counter = {{static_cast<uint32_t>(id / 4), noise_.token, noise_.step, kStreamToken}};
      word = philox4x32(counter, noise_.key0, noise_.key1).word[id % 4];
    }
    consider(id, word);
  }

  void consider(int64_t id, uint32_t word) {
    if (id >= a_.columns) return;  // padding
    const float logit = w_.x[id] / a_.softmax_temperature;
    float score = logit;
    if (noise_.kind != SampleRow::kNoNoise)
      score += a_.tau * gumbel(noise_.kind == SampleRow::kCounter ? philox_uniform(word) : uniforms_[id]);
    if (score > best_.score || (score == best_.score && id < best_.id)) best_ = {score, id, logit};
  }

  const SampleArguments& a_;
  const SampleScanKernel& kernel_;
  Workspace& w_;
  SampleRow noise_ = {};
  const float* uniforms_ = nullptr;
  Best best_;
};

}  // namespace

void sample_from_logits(const SampleArguments& arguments, int num_threads, const std::string& isa) {
  const SampleScanKernel& kernel = scan_kernel(isa);
  if (arguments.rows == 0) return;
  // All memory is taken here: an exception must not leave a parallel region.
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, arguments.rows));
  std::vector<Workspace> workspaces(threads, Workspace((arguments.columns + kSampleChunk - 1) / kSampleChunk));

#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < arguments.rows; ++row) {
    const Best best = RowSampler(arguments, kernel, row, workspaces[omp_get_thread_num()]).run();
    arguments.ids[row] = best.id;
    arguments.confidence[row] = best.logit;
  }
}

}  // namespace dcar
