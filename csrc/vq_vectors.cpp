#include <cstring>

#include "normalise.h"
#include "vq_lookup.h"

namespace dcar {
namespace {

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float widen_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

float widen_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);  // infinity and NaN
  const float x = float_of(magnitude << 13) * 0x1p112f;  // moves the exponent, and normalises subnormals exactly
  return sign ? -x : x;
}

}  // namespace

void VqVectors::normalise_to(int64_t index, float* out) const {
  const int64_t first = index * channels;
  if (type == VqType::kFloat32) return normalise(static_cast<const float*>(data) + first, channels, out);
  const auto* halves = static_cast<const uint16_t*>(data) + first;
  if (type == VqType::kBFloat16)
    for (int64_t c = 0; c < channels; ++c) out[c] = widen_bfloat16(halves[c]);
  else
    for (int64_t c = 0; c < channels; ++c) out[c] = widen_float16(halves[c]);
  normalise(out, channels, out);
}

}  // namespace dcar
