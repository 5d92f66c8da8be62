// Compiled with -mavx512f: reached only when the CPU has it.
// GCC's own header initialises "undefined" registers with themselves, and GCC 12 warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "sample_scan_impl.h"

namespace dcar {
namespace {

struct Vec512 {
  using Float = __m512;
  using Int = __m512i;
  using Wide = __m512i;
  static constexpr int kLanes = 16;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const uint16_t* p) {  // bfloat16: the upper half of a float
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static void store(uint32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Float multiply_then_add(Float a, Float b, Float sum) {
    Float product = _mm512_mul_ps(a, b);
    asm("" : "+v"(product));  // keeps the compiler from fusing, which rounds once instead of twice
    return _mm512_add_ps(product, sum);
  }
  static Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float without_nan(Float x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), broadcast(-kInfinity));
  }
  static unsigned not_less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static Float bits_as_float(Float x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
  // 2^23 (1 - u) for the uniform u of a word: exact.
  static Float complement(Int word) {
    const Int upper = _mm512_srli_epi32(_mm512_andnot_si512(word, _mm512_set1_epi32(-1)), 9);
    return _mm512_add_ps(_mm512_cvtepi32_ps(upper), broadcast(0.5f));
  }

  static Wide wide(uint32_t x) { return _mm512_set1_epi64(x); }
  // In the order in which merge() leaves the quads sorted.
  static Wide quads(uint32_t first) {
    return _mm512_add_epi32(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_set1_epi32(static_cast<int>(first)));
  }
  static Wide multiply(Wide a, uint32_t b) { return _mm512_mul_epu32(a, wide(b)); }
  static Wide high_xor(Wide product, Wide a, Wide b) {
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), a, b, 0x96);
  }
  static void merge(Wide c0, Wide c1, Wide c2, Wide c3, Int words[2]) {
    const Int first = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
    const Int second = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
    words[0] = _mm512_unpacklo_epi64(first, second);
    words[1] = _mm512_unpackhi_epi64(first, second);
  }
};

}  // namespace

const SampleScanKernel kSampleScanAvx512 = make_sample_kernel<Vec512>();

}  // namespace dcar
