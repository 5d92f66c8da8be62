// Compiled with the compiler's baseline flags: SSE2 on x86-64, NEON on 64-bit Arm.
#include <cstring>

#include "sample_scan_impl.h"

namespace dcar {
namespace {

struct Vec128 {
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Int __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  typedef uint64_t Wide __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;

  static Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static Float load(const uint16_t* p) {  // bfloat16: the upper half of a float
    return as_float(Int{p[0], p[1], p[2], p[3]} << 16);
  }
  static void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
  static void store(uint32_t* p, Int x) { std::memcpy(p, &x, sizeof x); }
  static Float broadcast(float x) { return Float{x, x, x, x}; }
  static Float subtract(Float a, Float b) { return a - b; }
  static Float multiply_add(Float a, Float b, Float sum) { return a * b + sum; }
  static Float multiply_then_add(Float a, Float b, Float sum) {
    Float product = a * b;
#ifdef __aarch64__
    asm("" : "+w"(product));  // keeps the compiler from fusing, which rounds once instead of twice
#endif
    return product + sum;
  }
  static Float larger(Float a, Float b) { return a > b ? a : b; }
  static Float without_nan(Float x) { return x == x ? x : broadcast(-kInfinity); }
  static unsigned not_less(Float a, Float b) {
    const Signed less = a < b;  // -1 where it is
    return static_cast<unsigned>((less[0] + 1) | (less[1] + 1) << 1 | (less[2] + 1) << 2 | (less[3] + 1) << 3);
  }
  static Float bits_as_float(Float x) {
    Signed bits;
    std::memcpy(&bits, &x, sizeof bits);
    return __builtin_convertvector(bits, Float);
  }
  // 2^23 (1 - u) for the uniform u of a word: exact.
  static Float complement(Int word) {
    const Int upper = ~word >> 9;
    Signed value;
    std::memcpy(&value, &upper, sizeof value);  // SSE2 converts signed integers only
    return __builtin_convertvector(value, Float) + 0.5f;
  }

  static Wide wide(uint32_t x) { return Wide{x, x}; }
  static Wide quads(uint32_t first) { return Wide{first, first + 1}; }
  static Wide multiply(Wide a, uint32_t b) { return (a & 0xFFFFFFFFu) * b; }
  static Wide high_xor(Wide product, Wide a, Wide b) { return (product >> 32) ^ a ^ b; }
  static void merge(Wide c0, Wide c1, Wide c2, Wide c3, Int words[2]) {
    for (int i = 0; i < 2; ++i)
      words[i] = Int{static_cast<uint32_t>(c0[i]), static_cast<uint32_t>(c1[i]), static_cast<uint32_t>(c2[i]),
                     static_cast<uint32_t>(c3[i])};
  }

 private:
  static Float as_float(Int bits) {
    Float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace

const SampleScanKernel kSampleScanGeneric = make_sample_kernel<Vec128>();

}  // namespace dcar
