// Philox and Box-Muller for a block of counters: plain loops that compilers turn into vector code, compiled once per
// instruction set.
//
// Included by latent_noise_<isa>.cpp only. Everything is in an unnamed namespace and no standard header with inline
// code is included: a function compiled for AVX-512 must never be the copy that the linker keeps for everyone.
#pragma once

#include "latent_block.h"
#include "philox.h"

namespace dcar {
namespace {

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// log of a positive, finite, normal number, to 2 ulp. x = 2^e m with m in [2/3, 4/3), so t = m - 1 is exact, and
// log m = t + t^2 P(t), P fitted to |t| <= 1/3 with the least relative error of the whole (2.6e-8).
inline float log_normal_number(float x) {
  const uint32_t bits = bits_of_float(x), exponent = (bits - 0x3F2AAAABu) & 0xFF800000u;
  const float t = float_of_bits(bits - exponent) - 1.0f;
  float p = t * 0.14026351230012457f - 0.15388540780769086f;
  p = p * t + 0.13995808515194263f;
  p = p * t - 0.16415960573482388f;
  p = p * t + 0.20011168577958816f;
  p = p * t - 0.2500781890445426f;
  p = p * t + 0.3333319813858927f;
  p = p * t - 0.4999993607865066f;
  const float octaves = static_cast<float>(static_cast<int32_t>(exponent));  // times 2^23
  return octaves * 8.262958294867817e-08f + (p * (t * t) + t);                // ln 2 / 2^23
}

struct Pair {
  float first, second;
};

// sqrt(-2 ln u) times (cos, sin)(2 pi v). The quarter turn nearest to v is taken off exactly, so the polynomials see at
// most an eighth of a turn.
inline Pair box_muller(float u, float v) {
  const float radius = __builtin_sqrtf(-2.0f * log_normal_number(u));
  const float turns = v * 4.0f;
  const int32_t nearest = static_cast<int32_t>(turns + 0.5f);
  const uint32_t quarter = static_cast<uint32_t>(nearest);
  const float f = turns - static_cast<float>(nearest), z = f * f;
  const float sine =
      (((z * -0.0046021769964794184f + 0.07968022806708416f) * z - 0.645963478641695f) * z + 1.5707963219668037f) * f;
  const float cosine =
      (((z * 0.0009036317f - 0.0208600713f) * z + 0.2536692039f) * z - 1.2337005406f) * z + 1.0f;
  // Odd quarters swap the two. Bit 1 becomes the sign: the cosine is negative in quarters 1 and 2, the sine in 2, 3.
  const uint32_t swap = (bits_of_float(sine) ^ bits_of_float(cosine)) & -(quarter & 1u);
  const uint32_t first = bits_of_float(cosine) ^ swap ^ ((quarter + 1u) & 2u) << 30;
  const uint32_t second = bits_of_float(sine) ^ swap ^ (quarter & 2u) << 30;
  return {radius * float_of_bits(first), radius * float_of_bits(second)};
}

inline float uniform_of(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

void latent_block(const LatentCounters& counters, float* normals) {
  uint32_t word[4][kLatentBlock];
#pragma omp simd
  for (int i = 0; i < kLatentBlock; ++i) {
    uint32_t c0 = counters.quad[i], c1 = counters.token[i], c2 = counters.step, c3 = counters.stream;
    uint32_t key0 = counters.key0[i], key1 = counters.key1[i];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
      const uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(p0);
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    word[0][i] = c0;
    word[1][i] = c1;
    word[2][i] = c2;
    word[3][i] = c3;
  }
  float value[4][kLatentBlock];
#pragma omp simd
  for (int i = 0; i < kLatentBlock; ++i) {
    const Pair front = box_muller(uniform_of(word[0][i]), uniform_of(word[1][i]));
    const Pair back = box_muller(uniform_of(word[2][i]), uniform_of(word[3][i]));
    value[0][i] = front.first;
    value[1][i] = front.second;
    value[2][i] = back.first;
    value[3][i] = back.second;
  }
  for (int i = 0; i < kLatentBlock; ++i)
    for (int element = 0; element < 4; ++element) normals[4 * i + element] = value[element][i];
}

}  // namespace
}  // namespace dcar
