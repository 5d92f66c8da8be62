#include "vq_filter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vq_scan.h"

namespace dcar {
namespace {

// |c| of a normalised code, rounded up: its norm was computed with a relative error far below a hundredth.
constexpr double kUnit = 1.01;
// Of a sum of up to 8192 squares in float32, the relative error of its root, rounded up; and of a residual, relative to
// the vector it is left of: it is the rounded difference of x and a rounded product.
constexpr double kSumSlack = 1.001, kResidualSlack = 0x1p-22;

// Nearest of the integers -127..127 to a number of at most 127.01 in magnitude, plus 128. NaN becomes 0.
inline int32_t shifted_round(float x) {
  const float shifted = x + 128.5f;
  return shifted >= 1.0f ? static_cast<int32_t>(std::min(shifted, 255.0f)) : 0;
}

}  // namespace

float vq_largest(const float* x, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  return largest;
}

float vq_quantise_codes(const float* block, int64_t count, int64_t channels, float step, uint8_t* bytes,
                        int32_t* bias) {
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  float square[kVqFilterCodes] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const float* x = block + c * kVqFilterCodes;
    uint8_t* to = bytes + c / 4 * 4 * kVqFilterCodes + c % 4;
    for (int i = 0; i < kVqFilterCodes; ++i) {
      const int32_t shifted = shifted_round(x[i] * inverse);
      const float left = x[i] - step * static_cast<float>(shifted - 128);
      square[i] += left * left;  // NaN where the code holds NaN
      to[4 * i] = static_cast<uint8_t>(shifted);
    }
  }
  float largest = 0.0f;
  for (int i = 0; i < kVqFilterCodes; ++i) {
    const bool usable = i < count && square[i] == square[i];
    bias[i] = usable ? 0 : kVqNeverCandidate;
    if (usable) {
      largest = std::max(largest, square[i]);
    } else {
      for (int64_t g = 0; g < (channels + 3) / 4; ++g) std::memset(bytes + (g * kVqFilterCodes + i) * 4, 0, 4);
    }
  }
  return static_cast<float>(std::sqrt(largest) * kSumSlack + kResidualSlack * kUnit);
}

void vq_quantise_row(const float* row, int64_t channels, float code_error, float code_step, int64_t stride,
                     int32_t* words, int32_t* window, int32_t* threshold) {
  const float step = vq_largest(row, channels) / 127.0f;
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  float norm_square = 0.0f, left_square = 0.0f;
  for (int64_t g = 0; g < (channels + 3) / 4; ++g) {
    int8_t bytes[4] = {};
    for (int64_t c = 4 * g; c < std::min(channels, 4 * g + 4); ++c) {
      const int32_t rounded = shifted_round(row[c] * inverse) - 128;
      const float left = row[c] - step * static_cast<float>(rounded);
      norm_square += row[c] * row[c];
      left_square += left * left;
      bytes[c % 4] = static_cast<int8_t>(rounded);
    }
    std::memcpy(words + g * stride, bytes, 4);
  }
  const double norm = std::sqrt(static_cast<double>(norm_square)) * kSumSlack;
  const double left = std::sqrt(static_cast<double>(left_square)) * kSumSlack + kResidualSlack * norm;
  const double rounding = static_cast<double>(channels) * 0x1p-24 * kUnit;
  const double bound = norm * code_error + left * (kUnit + code_error) + rounding * norm * kUnit +
                       static_cast<double>(channels) * 0x1p-149;
  const double width = 2.0 * bound / (static_cast<double>(step) * code_step) * kSumSlack + 1.0;
  constexpr int32_t kEverything = 1 << 30;
  // Rows that are not of length 1, because they were too small or too large to normalise, are too rare to bound.
  const bool bounded = norm_square > 0.5f && width < kEverything;
  *window = bounded ? static_cast<int32_t>(std::ceil(width)) : kEverything;
  *threshold = norm == norm ? kVqNoThreshold : std::numeric_limits<int32_t>::max();
}

}  // namespace dcar
