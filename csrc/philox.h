// Philox4x32-10 (Salmon et al., SC 2011) as dcar_fast/noise.py defines the sampling noise, for host and device:
//   key = (low, high) words of the image's seed, counter = (element / 4, token, step, stream), word element % 4.
//
// Internal linkage: files compiled for different instruction sets include this, and each must keep its own copy.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DCAR_HOST_DEVICE __host__ __device__
#else
#define DCAR_HOST_DEVICE
#endif

namespace dcar {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr uint32_t kStreamToken = 0, kStreamConfidence = 1, kStreamLatentInit = 2, kStreamLatent = 3;

struct PhiloxWords {
  uint32_t word[4];
};

DCAR_HOST_DEVICE inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * kPhiloxMultiplier0;
    const uint64_t p1 = static_cast<uint64_t>(c[2]) * kPhiloxMultiplier1;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(p0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// ((word >> 9) + 0.5) * 2^-23: exact, strictly inside (0, 1).
DCAR_HOST_DEVICE inline float philox_uniform(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 1.1920928955078125e-7f;
}

}  // namespace
}  // namespace dcar
