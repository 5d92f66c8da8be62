// Compiled with -mavx2 -mfma: reached only when the CPU has both.
#include <immintrin.h>

#include "vq_scan_impl.h"

namespace dcar {
namespace {

struct Vec256 {
  using Float = __m256;
  using Int = __m256i;
  static constexpr int kLanes = 8;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Int load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static void store(int32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }

  // Strict and ordered: the earlier vector keeps a tie, and NaN never wins.
  static void keep_larger(Float score, int32_t vector, Float& top, Int& from) {
    const __m256 larger = _mm256_cmp_ps(score, top, _CMP_GT_OQ);
    top = _mm256_blendv_ps(top, score, larger);
    from = _mm256_blendv_epi8(from, _mm256_set1_epi32(vector), _mm256_castps_si256(larger));
  }
};

}  // namespace

// 6 rows x 2 vectors: 12 accumulators, 2 code vectors and 1 broadcast of 16 registers.
const VqScanKernel kVqScanAvx2 = make_scan_kernel<Vec256, 6, 2>();

}  // namespace dcar
