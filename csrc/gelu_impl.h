// The loops of gelu_loop.h over the vectors that the instruction set has.
//
// Included by gelu_<isa>.cpp only. Everything is in an unnamed namespace and no standard header with inline code is
// included: a function compiled for AVX-512 must never be the copy that the linker keeps for everyone.
//
//   x/2 (1 + tanh z) = x / (1 + e^-2z) = max(x, 0) - |x| r,  r = e / (1 + e),
//   e = 2^w,  w = -2 log2(e) sqrt(2/pi) (|x| + 0.044715 |x|^3)
//
// The last form is rounded least: for x > 0 the correction is small, and below 0, where 1 + tanh would cancel, the
// product keeps its relative accuracy.
#pragma once

#include "gelu_loop.h"

namespace dcar {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kLargest = 3.4028234663852886e38f;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// w = n + f with |f| <= 1/2: adding 1.5 * 2^23 leaves n in the low bits, and 2^f is a polynomial fitted for the least
// relative error (1.6e-8). From -127 on 2^w is 0. NaN stays NaN, and so does -infinity become, as in PyTorch: the two
// halves are max(x, 0) of finite numbers, which do not overflow.
inline void gelu_of(Floats& x) {
  const Floats size = (Floats)((Words)x & 0x7fffffffu);
  Floats w = size * (-2.3022082f - 0.10294324f * (x * x));
  w = w > -127.0f ? w : Floats{} - 127.0f;
  const Floats shifted = w + 12582912.0f, f = w - (shifted - 12582912.0f);
  Floats p = f * 0.00015353258640971035f + 0.0013399003073573112f;
  p = p * f + 0.00961843878030777f;
  p = p * f + 0.05550331994891167f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  const Floats e = p * (Floats)(((Words)shifted + 127) << 23);
  const Floats finite = size < kLargest ? size : Floats{} + kLargest;
  x = (0.5f * x + 0.5f * size) - finite * (e / (1.0f + e));
}

// The bits of float32 numbers rounded to bfloat16, nearest even, in the upper halves.
inline Words rounded(Floats y) {
  const Words bits = (Words)y;
  return y == y ? bits + 0x7fff + (bits >> 16 & 1) : Words{} + 0x7fc00000u;
}

// Up to as many numbers as there are in Words.
inline void gelu_some(const float* x, float* out, unsigned long bytes) {
  Floats y{};
  __builtin_memcpy(&y, x, bytes);
  gelu_of(y);
  __builtin_memcpy(out, &y, bytes);
}

inline void gelu_some(const uint16_t* x, uint16_t* out, unsigned long bytes) {
  Words pairs{};
  __builtin_memcpy(&pairs, x, bytes);
  Floats low = (Floats)(pairs << 16), high = (Floats)(pairs & 0xffff0000u);
  gelu_of(low);
  gelu_of(high);
  pairs = rounded(low) >> 16 | (rounded(high) & 0xffff0000u);
  __builtin_memcpy(out, &pairs, bytes);
}

template <class T>
void gelu_all(const T* x, T* out, int64_t count) {
  constexpr int kNumbers = sizeof(Words) / sizeof(T);
  int64_t i = 0;
  for (; i + kNumbers <= count; i += kNumbers) gelu_some(x + i, out + i, sizeof(Words));
  if (i < count) gelu_some(x + i, out + i, (count - i) * sizeof(T));
}

constexpr GeluLoop make_gelu_loop() { return {gelu_all<float>, gelu_all<uint16_t>}; }

}  // namespace
}  // namespace dcar
