// Confidence-based re-masking: the least confident tokens of every row become MASK again. The rule is
// dcar_fast/reference/remask.py's.
#pragma once

#include <cstdint>
#include <string>

#include "float_type.h"

#ifdef __CUDACC__
#define DCAR_HOST_DEVICE __host__ __device__
#else
#define DCAR_HOST_DEVICE
#endif

namespace dcar {

// Row b of out (rows, tokens), contiguous, is row b of ids with the num_masked[b] positions that are lowest by
// (confidence, index) set to mask_id; NaN is below everything, and -0 equals +0. Strides count elements and may be 0.
struct Remask {
  const int64_t* ids;
  int64_t ids_row, ids_column;
  const void* confidence;
  int64_t confidence_row, confidence_column;
  FloatType type;
  const int64_t* num_masked;
  int64_t num_masked_row;
  int64_t mask_id;
  int64_t* out;
  int64_t rows, tokens;
};

// On the CPU. Throws std::invalid_argument, before it writes anything, if a num_masked is outside 0..tokens.
void remask_cpu(const Remask& task, int num_threads);

// The same on the current CUDA device, enqueued on `stream`; at most 2^31 - 1 rows, and as many tokens. Looking at
// num_masked here would mean waiting for the device, so it is clamped to 0..tokens instead. Returns an empty string, or
// the CUDA error.
std::string remask_cuda(const Remask& task, void* stream);

// A number that orders like the floating-point number with these bits, whatever its type: IEEE formats are a sign and a
// magnitude. `infinity`: the bits of that type's infinity; beyond them is NaN, which comes out lowest.
template <class Key, class Bits>
DCAR_HOST_DEVICE inline Key rank_key(Bits bits, Key infinity) {
  constexpr auto kWithoutSign = static_cast<Bits>(~uint64_t{0} >> (65 - 8 * sizeof(Bits)));
  const Key magnitude = bits & kWithoutSign;
  if (magnitude > infinity) return -infinity - 1;
  return bits < 0 ? -magnitude : magnitude;
}

}  // namespace dcar
