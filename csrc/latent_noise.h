// Standard normals for rows of latents on the CPU, as dcar_fast/noise.py defines them.
#pragma once

#include <cstdint>
#include <string>

namespace dcar {

struct LatentNoise {
  const int64_t* seeds;   // (rows)
  const int64_t* tokens;  // (rows)
  int64_t rows, channels;
  uint32_t step;
  bool initial;
  float* out;  // (rows, channels)
};

// Throws std::invalid_argument, before it writes anything, for a negative seed and a token that is no 32-bit word.
// `isa`: one of usable_isas(); the random words do not depend on it, the normals do in their last bits.
void latent_noise(const LatentNoise& task, int num_threads, const std::string& isa);

}  // namespace dcar
