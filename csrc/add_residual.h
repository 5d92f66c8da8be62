// Decoder input from token ids: normalised codes + residual, channels first. The formula is
// dcar_fast/reference/add_residual.py's.
#pragma once

#include <cstdint>
#include <string>

#include "float_type.h"

namespace dcar {

// ids (batch, tokens) int64, codebook (num_codes, channels) and residual (batch, tokens, channels) or null
// -> out (batch, channels, tokens):
//   out[b, c, t] = normalise(codebook[ids[b, t]])[c] + residual[b, t, c],  normalise(x) = x / max(|x|, 1e-12)
// Types are float32, float16 or bfloat16, each its own; sums are float32 and rounded once, to nearest even. All is
// contiguous but the residual, whose strides count elements and may be 0.
struct AddResidual {
  const int64_t* ids;
  const void* codebook;
  FloatType codebook_type;
  const void* residual;
  FloatType residual_type;
  int64_t residual_image, residual_token, residual_channel;
  void* out;
  FloatType out_type;
  int64_t batch, tokens, num_codes, channels;
};

// On the CPU. Throws std::invalid_argument, before it writes anything, if an id is outside 0..num_codes-1.
void add_residual_cpu(const AddResidual& task, int num_threads);

// The same on the current CUDA device, enqueued on `stream`. Looking at the ids here would mean waiting for the device,
// so a token whose id is outside 0..num_codes-1 becomes NaN instead. Returns an empty string, or the CUDA error.
std::string add_residual_cuda(const AddResidual& task, void* stream);

}  // namespace dcar
