// Compiled with the compiler's baseline flags: SSE2 on x86-64, NEON on 64-bit Arm.
#include <cstring>

#include "vq_scan_impl.h"

namespace dcar {
namespace {

struct Vec128 {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;

  static Float zero() { return Float{}; }
  static Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static Int load(const int32_t* p) {
    Int x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
  static void store(int32_t* p, Int x) { std::memcpy(p, &x, sizeof x); }
  static Float broadcast(float x) { return Float{x, x, x, x}; }
  static Float multiply_add(Float a, Float b, Float sum) { return a * b + sum; }

  // Strict and ordered: the earlier vector keeps a tie, and NaN never wins.
  static void keep_larger(Float score, int32_t vector, Float& top, Int& from) {
    const Int larger = score > top;
    top = larger ? score : top;
    from = larger ? Int{vector, vector, vector, vector} : from;
  }
};

}  // namespace

// 6 rows x 2 vectors: 12 accumulators, 2 code vectors and 1 broadcast of SSE's 16 registers.
const VqScanKernel kVqScanGeneric = make_scan_kernel<Vec128, 6, 2>();

}  // namespace dcar
