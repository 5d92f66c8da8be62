// Compiled with -mavx2 -mfma: reached only when the CPU has both.
#include <immintrin.h>

#include "sample_scan_impl.h"

namespace dcar {
namespace {

struct Vec256 {
  using Float = __m256;
  using Int = __m256i;
  using Wide = __m256i;
  static constexpr int kLanes = 8;

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const uint16_t* p) {  // bfloat16: the upper half of a float
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static void store(uint32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Float multiply_then_add(Float a, Float b, Float sum) {
    Float product = _mm256_mul_ps(a, b);
    asm("" : "+x"(product));  // keeps the compiler from fusing, which rounds once instead of twice
    return _mm256_add_ps(product, sum);
  }
  static Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float without_nan(Float x) {
    return _mm256_blendv_ps(x, broadcast(-kInfinity), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  static unsigned not_less(Float a, Float b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
  }
  static Float bits_as_float(Float x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
  // 2^23 (1 - u) for the uniform u of a word: exact.
  static Float complement(Int word) {
    const Int upper = _mm256_srli_epi32(_mm256_xor_si256(word, _mm256_set1_epi32(-1)), 9);
    return _mm256_add_ps(_mm256_cvtepi32_ps(upper), broadcast(0.5f));
  }

  static Wide wide(uint32_t x) { return _mm256_set1_epi64x(x); }
  // In the order in which merge() leaves the quads sorted.
  static Wide quads(uint32_t first) {
    return _mm256_add_epi32(_mm256_setr_epi64x(0, 2, 1, 3), _mm256_set1_epi32(static_cast<int>(first)));
  }
  static Wide multiply(Wide a, uint32_t b) { return _mm256_mul_epu32(a, wide(b)); }
  static Wide high_xor(Wide product, Wide a, Wide b) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product, 32), a), b);
  }
  static void merge(Wide c0, Wide c1, Wide c2, Wide c3, Int words[2]) {
    const Int first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const Int second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    words[0] = _mm256_unpacklo_epi64(first, second);
    words[1] = _mm256_unpackhi_epi64(first, second);
  }
};

}  // namespace

const SampleScanKernel kSampleScanAvx2 = make_sample_kernel<Vec256>();

}  // namespace dcar
