// The floating-point types of the tensors that kernels read and write, and the 16-bit ones as bit patterns on the CPU.
// Not for files that are compiled per instruction set: the linker keeps one copy of an inline function for everyone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dcar {

enum class FloatType { kFloat16, kBFloat16, kFloat32, kFloat64 };

inline size_t bytes_of(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t exponent = shifted & 0x0f800000;
  const uint32_t rebiased = shifted + (112u << 23);
  // All ones are infinity and NaN and stay all ones. Zero is a subnormal number: 2^-14 with the bits, less 2^-14.
  const uint32_t special = rebiased + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(rebiased + (1u << 23)) - 0x1p-14f);
  return float_of(sign | (exponent == 0x0f800000 ? special : exponent == 0 ? subnormal : rebiased));
}

// Rounded to nearest even.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Selects instead of branches: which values come is not predictable.
inline uint16_t to_float16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the addition rounds at 2^-24
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
  uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
  rounded = magnitude >= 0x477ff000 ? 0x7c00 : rounded;            // 65520 and more round to infinity
  rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;             // NaN
  return static_cast<uint16_t>(sign | rounded);
}

}  // namespace dcar
