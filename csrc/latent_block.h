// The inner loop of latent_noise, one per instruction set. Kept apart from latent_noise.h so that the files compiled
// for one instruction set include nothing else.
#pragma once

#include <cstdint>

namespace dcar {

constexpr int kLatentBlock = 64;  // counters that one call works on

// Counters and keys of Philox, side by side.
struct LatentCounters {
  uint32_t quad[kLatentBlock], token[kLatentBlock], key0[kLatentBlock], key1[kLatentBlock];
  uint32_t step, stream;
};

// normals[4 i .. 4 i + 3] are the four normals of counter i; all kLatentBlock are computed.
using LatentBlockKernel = void (*)(const LatentCounters& counters, float* normals);

extern const LatentBlockKernel kLatentNoiseGeneric;
#ifdef DCAR_FAST_X86
extern const LatentBlockKernel kLatentNoiseAvx2;
extern const LatentBlockKernel kLatentNoiseAvx512;
#endif

}  // namespace dcar
