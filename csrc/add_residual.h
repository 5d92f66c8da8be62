// Decoder input from token ids: normalised codes + residual, channels first. The formula is
// dcar_fast/reference/add_residual.py's.
#pragma once

#include <cstdint>
#include <string>

namespace dcar {

enum class OutputType { kFloat32, kFloat16, kBFloat16 };

// ids (batch, tokens) int64, codebook (num_codes, channels) float32, residual (batch, tokens, channels) float32 or
// null, all contiguous -> out (batch, channels, tokens) of type `type`, contiguous:
//   out[b, c, t] = normalise(codebook[ids[b, t]])[c] + residual[b, t, c],  normalise(x) = x / max(|x|, 1e-12)
// Sums are float32 and rounded to nearest even.
//
// On the CPU. Throws std::invalid_argument, before it writes anything, if an id is outside 0..num_codes-1.
void add_residual_cpu(const int64_t* ids, const float* codebook, const float* residual, void* out, int64_t batch,
                      int64_t tokens, int64_t num_codes, int64_t channels, OutputType type, int num_threads);

// The same on the current CUDA device, enqueued on `stream`. Looking at the ids here would mean waiting for the device,
// so a token whose id is outside 0..num_codes-1 becomes NaN instead. Returns an empty string, or the CUDA error.
std::string add_residual_cuda(const int64_t* ids, const float* codebook, const float* residual, void* out,
                              int64_t batch, int64_t tokens, int64_t num_codes, int64_t channels, OutputType type,
                              void* stream);

}  // namespace dcar
