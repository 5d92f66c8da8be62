// L2 normalisation as torch.nn.functional.normalize computes it.
#pragma once

#include <cmath>
#include <cstdint>

namespace dcar {

// max(|x|, 1e-12) of a float32 vector. Sixteen partial sums in a fixed order: the compiler can put them in vectors of
// any width, and equal vectors give equal norms. Squares are summed in float32, so a norm beyond 1.8e19 is infinite,
// as it is in torch.
inline float clamped_norm(const float* x, int64_t channels) {
  constexpr int kParts = 16;
  float part[kParts] = {};
  int64_t c = 0;
  for (; c + kParts <= channels; c += kParts)
    for (int i = 0; i < kParts; ++i) part[i] += x[c + i] * x[c + i];
  for (int i = 0; c + i < channels; ++i) part[i] += x[c + i] * x[c + i];
  for (int width = kParts / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  const float norm = std::sqrt(part[0]);
  return norm < 1e-12f ? 1e-12f : norm;  // written so that NaN stays NaN
}

// out = x / max(|x|, 1e-12); `out` may be `x`.
inline void normalise(const float* x, int64_t channels, float* out) {
  const float norm = clamped_norm(x, channels);
  for (int64_t c = 0; c < channels; ++c) out[c] = x[c] / norm;
}

}  // namespace dcar
