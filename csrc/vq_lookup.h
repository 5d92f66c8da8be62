// Nearest code of a codebook by cosine, on the CPU. The formula is dcar_fast/reference/vq_lookup.py's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dcar {

enum class VqType { kFloat32, kFloat16, kBFloat16 };

// `count` vectors of `channels` numbers, contiguous. Widened to float32 one vector at a time.
struct VqVectors {
  const void* data;
  VqType type;
  int64_t count;
  int64_t channels;

  // normalise(vector `index`), float32, as torch.nn.functional.normalize computes it.
  void normalise_to(int64_t index, float* out) const;
};

// How vq_lookup can run on this CPU, best first: "avx512vnni", then usable_isas().
const std::vector<std::string>& vq_lookup_isas();

// For each vector of z (rows, channels) and the codebook (num_codes, channels):
//   ids       (rows,)           int64  lowest index among the codes with the largest cosine; 0 if no cosine is a number
//   codes     (rows, channels)  float  normalise(codebook[id])
//   residual  (rows, channels)  float  normalise(z) - codes
// with normalise(x) = x / max(|x|, 1e-12).
//
// Every score is the same chain of float32 operations over the channels whatever the position of row or code, so equal
// codes tie exactly and the result depends neither on `num_threads` nor on how the work is split, nor on whether codes
// were ruled out first (vq_filter.h). NaN never wins a comparison. `isa` is one of vq_lookup_isas(). Throws
// std::bad_alloc; the caller has checked everything else.
//
// Extra memory: a packed slice of the codebook (at most 20 MB, or one block of 64 codes where that is more) and at most
// some 500 KB per thread.
void vq_lookup(const VqVectors& z, const VqVectors& codebook, int64_t* ids, float* codes, float* residual,
               int num_threads, const std::string& isa);

}  // namespace dcar
