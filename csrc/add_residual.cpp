#include "add_residual.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include <omp.h>

#include "normalise.h"

namespace dcar {
namespace {

constexpr int64_t kTileTokens = 64;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The two 16-bit formats as their bit patterns, rounded to nearest even.
uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;                                      // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);       // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                                                   // below 2^-14: subnormal
    const uint32_t shifted = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the addition rounds at 2^-24
    return static_cast<uint16_t>(sign | shifted);
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

float to_float32(float x) { return x; }

template <class Out, Out (*convert)(float)>
void add_residual_as(const int64_t* ids, const float* codebook, const float* residual, Out* out, int64_t batch,
                     int64_t tokens, int64_t channels, int num_threads) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  std::vector<float> scratch(num_threads * kTileTokens * channels);

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t task = 0; task < batch * tiles; ++task) {
    const int64_t image = task / tiles;
    const int64_t first = task % tiles * kTileTokens;
    const int64_t count = std::min(kTileTokens, tokens - first);
    float* tile = scratch.data() + omp_get_thread_num() * kTileTokens * channels;  // (count, channels)

    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = image * tokens + first + t;
      float* row = tile + t * channels;
      normalise(codebook + ids[token] * channels, channels, row);
      if (residual != nullptr)
        for (int64_t c = 0; c < channels; ++c) row[c] += residual[token * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      Out* plane = out + (image * channels + c) * tokens + first;
      for (int64_t t = 0; t < count; ++t) plane[t] = convert(tile[t * channels + c]);
    }
  }
}

}  // namespace

void add_residual_cpu(const int64_t* ids, const float* codebook, const float* residual, void* out, int64_t batch,
                      int64_t tokens, int64_t num_codes, int64_t channels, OutputType type, int num_threads) {
  for (int64_t i = 0; i < batch * tokens; ++i)
    if (ids[i] < 0 || ids[i] >= num_codes)
      throw std::invalid_argument("ids: element " + std::to_string(i) + " is " + std::to_string(ids[i]) +
                                  ", allowed are 0.." + std::to_string(num_codes - 1));
  switch (type) {
    case OutputType::kFloat32:
      return add_residual_as<float, to_float32>(ids, codebook, residual, static_cast<float*>(out), batch, tokens,
                                                channels, num_threads);
    case OutputType::kFloat16:
      return add_residual_as<uint16_t, to_float16>(ids, codebook, residual, static_cast<uint16_t*>(out), batch, tokens,
                                                   channels, num_threads);
    case OutputType::kBFloat16:
      return add_residual_as<uint16_t, to_bfloat16>(ids, codebook, residual, static_cast<uint16_t*>(out), batch,
                                                    tokens, channels, num_threads);
  }
}

}  // namespace dcar
