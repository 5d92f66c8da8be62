// Guided Gumbel-max sampling of one token per row from given logits, on the CPU. The formula is
// dcar_fast/reference/sample_from_logits.py's.
#pragma once

#include <cstdint>
#include <string>

namespace dcar {

enum class LogitType { kFloat32, kBFloat16 };

// The arguments of one call. Rows of cond and uncond lie cond_stride and uncond_stride elements apart, columns side by
// side; the other arrays are contiguous. At tau = 0 no noise is read.
struct SampleArguments {
  const void* cond;       // (rows, columns)
  const void* uncond;     // (rows, columns), or null: not guided
  const float* uniforms;  // (rows, columns), or null: counter noise
  const int64_t* seeds;   // (rows,), for counter noise
  const int64_t* tokens;  // (rows,), for counter noise
  int64_t* ids;           // (rows,)
  float* confidence;      // (rows,)
  int64_t rows, columns, cond_stride, uncond_stride;
  LogitType type;
  uint32_t step;
  float guidance, softmax_temperature, tau;
};

// Logits are rounded as PyTorch rounds them, so confidences are equal bit for bit. The noise is evaluated in double and
// rounded once. All instruction sets, `isa` one of usable_isas(), and thread counts give the same ids.
void sample_from_logits(const SampleArguments& arguments, int num_threads, const std::string& isa);

}  // namespace dcar
