// The inner loops of sample_from_logits, written once over a vector type and compiled once per instruction set.
//
// Included by sample_scan_<isa>.cpp only. Everything is in an unnamed namespace and no standard header with inline code
// is included: a function compiled for AVX-512 must never be the copy that the linker keeps for everyone.
//
// Logarithms are not taken here. With v = 1 - u, -log(-log u) <= -log v, and the bits of a float v, read as an integer,
// are at most 2^23 (127 + log2 v). So ln 2 (127 - bits / 2^23) bounds the Gumbel noise, at most 0.06 above -log v, and
// only the few elements whose bound reaches the best score so far are evaluated, by the caller.
#pragma once

#include "philox.h"
#include "sample_scan.h"

namespace dcar {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLn2 = 0.69314718f;
constexpr float kSlack = 1e-4f;             // covers all rounding of the bound, in units of tau
constexpr float kLargestCounter = 16.64f;   // 24 ln 2, the noise of u = 1 - 2^-24
constexpr float kLargestUniform = 46.06f;   // -log(1e-20), the noise of u = 1

// Ten rounds for 2 kLanes / 4 quads from `quad` on: the words of 2 kLanes consecutive elements. Each 64-bit lane works
// on one counter; only the low halves of the lanes count, and merge() puts them in order.
template <class Vec>
inline void philox_words(uint32_t quad, const SampleRow& row, typename Vec::Int words[2]) {
  typename Vec::Wide c0 = Vec::quads(quad), c1 = Vec::wide(row.token), c2 = Vec::wide(row.step),
                     c3 = Vec::wide(kStreamToken);
  uint32_t key0 = row.key0, key1 = row.key1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const typename Vec::Wide p0 = Vec::multiply(c0, kPhiloxMultiplier0), p1 = Vec::multiply(c2, kPhiloxMultiplier1);
    c0 = Vec::high_xor(p1, c1, Vec::wide(key0));
    c1 = p1;
    c2 = Vec::high_xor(p0, c3, Vec::wide(key1));
    c3 = p0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  Vec::merge(c0, c1, c2, c3, words);
}

template <class Vec>
inline int note(unsigned mask, typename Vec::Float bound, typename Vec::Int word, int place, Survivor* found) {
  float bounds[Vec::kLanes];
  uint32_t words[Vec::kLanes];
  Vec::store(bounds, bound);
  Vec::store(words, word);
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    found[count++] = {place + lane, bounds[lane], words[lane]};
  }
  return count;
}

template <class Vec, SampleRow::Kind kKind>
inline int scan_chunk(const float* x, int64_t first, const float* uniforms, const SampleRow& row, float threshold,
                      Survivor* found) {
  constexpr int kLanes = Vec::kLanes;
  constexpr int kGroup = 4 * kLanes;  // two calls of philox_words, which run side by side
  using Float = typename Vec::Float;
  using Int = typename Vec::Int;
  const float exponents = kKind == SampleRow::kCounter ? 150.0f : 127.0f;  // counters give 2^23 v
  const float largest = kKind == SampleRow::kCounter ? kLargestCounter : kLargestUniform;
  const Float inverse = Vec::broadcast(row.inverse_temperature), limit = Vec::broadcast(threshold);
  const Float most_noise = Vec::broadcast(kKind == SampleRow::kNoNoise ? 0.0f : row.tau * largest);
  const Float offset = Vec::broadcast(row.tau * (exponents * kLn2 + kSlack));
  const Float slope = Vec::broadcast(-row.tau * kLn2 * 1.1920928955078125e-7f);

  int count = 0;
  for (int place = 0; place < kSampleChunk; place += kGroup) {
    Float value[4];
    for (int i = 0; i < 4; ++i) value[i] = Vec::load(x + place + i * kLanes);
    const Float group = Vec::larger(Vec::larger(value[0], value[1]), Vec::larger(value[2], value[3]));
    if (Vec::not_less(Vec::multiply_add(group, inverse, most_noise), limit) == 0) continue;

    Int word[4] = {};
    if (kKind == SampleRow::kCounter) {
      const uint32_t quad = static_cast<uint32_t>((first + place) / 4);
      philox_words<Vec>(quad, row, word);
      philox_words<Vec>(quad + kLanes / 2, row, word + 2);
    }
    for (int i = 0; i < 4; ++i) {
      Float bound = most_noise;
      if (kKind == SampleRow::kCounter)
        bound = Vec::multiply_add(Vec::bits_as_float(Vec::complement(word[i])), slope, offset);
      if (kKind == SampleRow::kUniforms) {
        const Float v = Vec::subtract(Vec::broadcast(1.0f), Vec::load(uniforms + place + i * kLanes));
        bound = Vec::multiply_add(Vec::bits_as_float(v), slope, offset);
      }
      bound = Vec::multiply_add(value[i], inverse, bound);
      const unsigned mask = Vec::not_less(bound, limit);
      if (mask != 0) count += note<Vec>(mask, bound, word[i], place + i * kLanes, found + count);
    }
  }
  return count;
}

template <class Vec>
int survivors(const float* x, int64_t first, const float* uniforms, const SampleRow& row, float threshold,
                      Survivor* found) {
  switch (row.kind) {
    case SampleRow::kCounter:
      return scan_chunk<Vec, SampleRow::kCounter>(x, first, uniforms, row, threshold, found);
    case SampleRow::kUniforms:
      return scan_chunk<Vec, SampleRow::kUniforms>(x, first, uniforms, row, threshold, found);
    default:
      return scan_chunk<Vec, SampleRow::kNoNoise>(x, first, uniforms, row, threshold, found);
  }
}

template <class Vec, class T>
inline typename Vec::Float guided(const T* cond, const T* uncond, typename Vec::Float guidance) {
  const typename Vec::Float c = Vec::load(cond);
  if (uncond == nullptr) return Vec::without_nan(c);
  return Vec::without_nan(Vec::multiply_then_add(guidance, Vec::subtract(c, Vec::load(uncond)), c));
}

template <class Vec, class T>
void guide(const T* cond, const T* uncond, int64_t columns, float guidance, float* x, float* chunk_largest) {
  const typename Vec::Float factor = Vec::broadcast(guidance);
  for (int64_t first = 0; first < columns; first += kSampleChunk) {
    const int64_t end = columns - first < kSampleChunk ? columns : first + kSampleChunk;
    typename Vec::Float largest = Vec::broadcast(-kInfinity);
    int64_t i = first;
    for (; i + Vec::kLanes <= end; i += Vec::kLanes) {
      const typename Vec::Float value = guided<Vec>(cond + i, uncond == nullptr ? uncond : uncond + i, factor);
      Vec::store(x + i, value);
      largest = Vec::larger(largest, value);
    }
    if (i < end) {  // the last columns, fewer than a vector has lanes
      T tail[2][Vec::kLanes] = {};
      for (int64_t j = i; j < end; ++j) {
        tail[0][j - i] = cond[j];
        if (uncond != nullptr) tail[1][j - i] = uncond[j];
      }
      Vec::store(x + i, guided<Vec>(tail[0], uncond == nullptr ? nullptr : tail[1], factor));
    }
    for (int64_t j = end; j < first + kSampleChunk; ++j) x[j] = -kInfinity;
    if (i < end) largest = Vec::larger(largest, Vec::load(x + i));
    float lanes[Vec::kLanes];
    Vec::store(lanes, largest);
    float top = lanes[0];
    for (int lane = 1; lane < Vec::kLanes; ++lane) top = lanes[lane] > top ? lanes[lane] : top;
    *chunk_largest++ = top;
  }
}

template <class Vec>
constexpr SampleScanKernel make_sample_kernel() {
  return {guide<Vec, float>, guide<Vec, uint16_t>, survivors<Vec>};
}

}  // namespace
}  // namespace dcar
