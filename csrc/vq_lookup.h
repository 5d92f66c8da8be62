// Nearest code of a codebook by cosine, on the CPU. The formula is dcar_fast/reference/vq_lookup.py's.
#pragma once

#include <cstdint>
#include <string>

namespace dcar {

// For each of `rows` vectors z (rows, channels) and the codebook (num_codes, channels), all float32 and contiguous:
//   ids       (rows,)           int64  lowest index among the codes with the largest cosine; 0 if no cosine is a number
//   codes     (rows, channels)  float  normalise(codebook[id])
//   residual  (rows, channels)  float  normalise(z) - codes
// with normalise(x) = x / max(|x|, 1e-12).
//
// Every score is the same chain of operations over the channels whatever the position of row or code, so equal codes
// tie exactly and the result depends neither on `num_threads` nor on how the work is split. NaN never wins a
// comparison. `isa` is one of usable_isas(). Throws std::bad_alloc; the caller has checked everything else.
//
// Extra memory: a packed slice of the codebook (at most 16 MB, or one block of 64 codes where that is more) and some
// 40 KB per thread.
void vq_lookup(const float* z, const float* codebook, int64_t* ids, float* codes, float* residual, int64_t rows,
               int64_t num_codes, int64_t channels, int num_threads, const std::string& isa);

}  // namespace dcar
