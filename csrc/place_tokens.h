// The end of an unmasking step on the CPU. The rule is dcar_fast/reference/place_tokens.py's.
#pragma once

#include <cstdint>

namespace dcar {

// A row-major array whose rows may lie apart; elements of a row lie side by side.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t row) const { return data + row * stride; }
};

struct PlaceTokens {
  enum Noise { kNone, kCounter, kUniforms } noise;
  Rows<int64_t> ids;         // (batch, tokens)
  Rows<int64_t> rows;        // (batch, sampled), null: all positions in order
  Rows<int64_t> chosen;      // (batch, sampled)
  Rows<float> confidence;    // (batch, sampled)
  Rows<float> uniforms;      // (batch, tokens), for kUniforms
  const int64_t* num_masked; // (batch), not read without noise
  const int64_t* seeds;      // (batch), for kCounter
  uint32_t step;
  int64_t mask_id;
  float tau;
  int64_t* new_ids;    // (batch, tokens)
  int64_t* next_rows;  // (batch, next_open)
  int64_t batch, tokens, sampled, next_open;
};

// Throws std::invalid_argument, before it writes anything, if a position is outside 0..tokens - 1, a num_masked outside
// 0..tokens or a seed negative.
void place_tokens(const PlaceTokens& task, int num_threads);

}  // namespace dcar
