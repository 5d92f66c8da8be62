// Compiled with -mavx512f: reached only when the CPU has it.
#include <immintrin.h>

#include "vq_scan_impl.h"

namespace dcar {
namespace {

struct Vec512 {
  using Float = __m512;
  using Int = __m512i;
  static constexpr int kLanes = 16;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static void store(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }

  // Strict and ordered: the earlier vector keeps a tie, and NaN never wins.
  static void keep_larger(Float score, int32_t vector, Float& top, Int& from) {
    const __mmask16 larger = _mm512_cmp_ps_mask(score, top, _CMP_GT_OQ);
    top = _mm512_mask_mov_ps(top, larger, score);
    from = _mm512_mask_set1_epi32(from, larger, vector);
  }
};

}  // namespace

// 6 rows x 4 vectors: 24 accumulators, 4 code vectors and 1 broadcast of 32 registers.
const VqScanKernel kVqScanAvx512 = make_scan_kernel<Vec512, 6, 4>();
const VqScanKernel kVqScanAvx512Row = make_scan_kernel<Vec512, 1, 4>();

}  // namespace dcar
