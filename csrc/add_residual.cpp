#include "add_residual.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "normalise.h"

namespace dcar {
namespace {

constexpr int64_t kTileTokens = 64;
// Below this many outputs starting threads costs more than it saves.
constexpr int64_t kOutputsPerThread = 1 << 16;

float to_float32(float x) { return x; }

template <class In, float (*convert)(In)>
const float* read_as(const void* source, int64_t first, int64_t stride, int64_t count, float* buffer) {
  const In* in = static_cast<const In*>(source) + first;
  if constexpr (std::is_same_v<In, float>)
    if (stride == 1) return in;
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) buffer[i] = convert(in[i]);
  else
    for (int64_t i = 0; i < count; ++i) buffer[i] = convert(in[i * stride]);
  return buffer;
}

// `count` numbers of any type as float32, where they are or in `buffer`.
using Read = const float* (*)(const void* source, int64_t first, int64_t stride, int64_t count, float* buffer);

Read reader(FloatType type) {
  return type == FloatType::kFloat16    ? read_as<uint16_t, from_float16>
         : type == FloatType::kBFloat16 ? read_as<uint16_t, from_bfloat16>
                                        : read_as<float, to_float32>;
}

template <class Out, Out (*convert)(float)>
void add_residual_as(const AddResidual& task, int num_threads) {
  const int64_t tokens = task.tokens, channels = task.channels;
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t useful = std::max<int64_t>(1, task.batch * tokens * channels / kOutputsPerThread);
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, useful));
  const Read read_code = reader(task.codebook_type), read_residual = reader(task.residual_type);
  const int64_t scratch_size = (kTileTokens + 2) * channels;
  std::vector<float> scratch(threads * scratch_size);

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t number = 0; number < task.batch * tiles; ++number) {
    const int64_t image = number / tiles;
    const int64_t first = number % tiles * kTileTokens;
    const int64_t count = std::min(kTileTokens, tokens - first);
    float* code_buffer = scratch.data() + omp_get_thread_num() * scratch_size;  // (channels,)
    float* residual_buffer = code_buffer + channels;                            // (channels,)
    float* tile = residual_buffer + channels;                                   // (count, channels)

    for (int64_t t = 0; t < count; ++t) {
      float* row = tile + t * channels;
      const float* code =
          read_code(task.codebook, task.ids[image * tokens + first + t] * channels, 1, channels, code_buffer);
      const float norm = clamped_norm(code, channels);
      if (task.residual == nullptr) {
        for (int64_t c = 0; c < channels; ++c) row[c] = code[c] / norm;
        continue;
      }
      const int64_t place = image * task.residual_image + (first + t) * task.residual_token;
      const float* added = read_residual(task.residual, place, task.residual_channel, channels, residual_buffer);
      for (int64_t c = 0; c < channels; ++c) row[c] = code[c] / norm + added[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      Out* plane = static_cast<Out*>(task.out) + (image * channels + c) * tokens + first;
      for (int64_t t = 0; t < count; ++t) plane[t] = convert(tile[t * channels + c]);
    }
  }
}

}  // namespace

void add_residual_cpu(const AddResidual& task, int num_threads) {
  for (int64_t i = 0; i < task.batch * task.tokens; ++i)
    if (task.ids[i] < 0 || task.ids[i] >= task.num_codes)
      throw std::invalid_argument("ids: element " + std::to_string(i) + " is " + std::to_string(task.ids[i]) +
                                  ", allowed are 0.." + std::to_string(task.num_codes - 1));
  switch (task.out_type) {
    case FloatType::kFloat16:
      return add_residual_as<uint16_t, to_float16>(task, num_threads);
    case FloatType::kBFloat16:
      return add_residual_as<uint16_t, to_bfloat16>(task, num_threads);
    default:
      return add_residual_as<float, to_float32>(task, num_threads);
  }
}

}  // namespace dcar
