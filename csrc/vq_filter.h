// Rules out most of a codebook with 8-bit integers, so that float32 scores are needed of a few blocks of codes only.
//
// Why the result is that of scoring everything in float32, to the last bit. Let x be a normalised row, c a normalised
// code, F(c) their float32 score, and let them be quantised, x = s p + e and c = t q + d, with integers |p|, |q| <= 127
// and one t for all codes. The integer score is A(c) = p.q, and with D >= |d| for every code
//
//   |x.c - s t A(c)|  =  |x.d + e.(t q)|  <=  |x| D + |e| (|c| + D)               by Cauchy-Schwarz
//   |F(c) - x.c|      <=  C 2^-24 / (1 - C 2^-24) |x| |c| + C 2^-149              a chain of C rounded operations
//
// Call the sum of both right-hand sides B. If F(c) is the largest score and u the code with the largest integer score,
// then s t A(c) >= F(c) - B >= F(u) - B >= s t A(u) - 2 B. So the winner, and every code that ties with it, lies at
// most window = 2 B / (s t) below A(u). Before u was seen the largest integer score was smaller, so nothing that may
// win falls below the threshold of that moment either.
// |e| and D are measured, not assumed, and everything is rounded up.
//
// The unsigned operand of the instruction is q + 128: that adds 128 (p_1 + ... + p_C), the same for every code. A code
// that holds NaN, and one beyond the last, gets a bias that no threshold reaches; a row that holds NaN a threshold that
// no score reaches. A row of zeros gets a window that lets every code pass.
#pragma once

#include <cstdint>

namespace dcar {

constexpr int64_t kVqFilterChannels = 8192;  // at most: 127 * 255 * 8192 and a window of 2^30 fit into 32 bits

// The largest magnitude among `count` numbers; NaN is passed over.
float vq_largest(const float* x, int64_t count);

// Quantises a block of normalised codes (channels, kVqFilterCodes), of which `count` are codes, with step `step`:
// `bytes` (groups, kVqFilterCodes, 4) and `bias` (kVqFilterCodes). Returns an upper bound of |d| over its codes.
float vq_quantise_codes(const float* block, int64_t count, int64_t channels, float step, uint8_t* bytes, int32_t* bias);

// Quantises a normalised row to (groups,) words of four signed bytes, `stride` words apart, and sets where its filter
// starts. `code_error` is D, `code_step` is t.
void vq_quantise_row(const float* row, int64_t channels, float code_error, float code_step, int64_t stride,
                     int32_t* words, int32_t* window, int32_t* threshold);

}  // namespace dcar
