// The inner loop of vq_lookup, written once over a vector type and compiled once per instruction set.
//
// Included by vq_scan_<isa>.cpp only. Everything is in an unnamed namespace and no standard header with inline code
// is included: a function compiled for AVX-512 must never be the copy that the linker keeps for everyone.
//
// Layouts, float32:
//   row tile    (channels, kRows)           the rows of a tile interleaved, so one pointer serves all broadcasts
//   code block  (channels, kVectors*kLanes) codes in the lanes: any number of channels works
//   best        (rows, kLanes)              largest score so far among the codes of each lane
//   best_vector (rows, kLanes)              number of the vector of kLanes codes it came from
#pragma once

#include "vq_scan.h"

namespace dcar {
namespace {

template <class Vec, int kRows, int kVectors>
inline void scan_tile(const float* rows, const float* codes, int64_t channels, int32_t first_vector, float* best,
                      int32_t* best_vector) {
  typename Vec::Float score[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) score[r][v] = Vec::zero();

  for (int64_t c = 0; c < channels; ++c) {
    typename Vec::Float code[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) code[v] = Vec::load(codes + v * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Vec::Float value = Vec::broadcast(rows[r]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) score[r][v] = Vec::multiply_add(value, code[v], score[r][v]);
    }
    rows += kRows;
    codes += kVectors * Vec::kLanes;
  }

#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    typename Vec::Float top = Vec::load(best + r * Vec::kLanes);
    typename Vec::Int from = Vec::load(best_vector + r * Vec::kLanes);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) Vec::keep_larger(score[r][v], first_vector + v, top, from);
    Vec::store(best + r * Vec::kLanes, top);
    Vec::store(best_vector + r * Vec::kLanes, from);
  }
}

template <class Vec, int kRows, int kVectors>
void scan(const float* row_tiles, int64_t num_tiles, const float* code_blocks, int64_t num_blocks, int64_t channels,
          int32_t first_vector, float* best, int32_t* best_vector) {
  // Blocks outside: a block stays in the first-level cache while every row tile of the panel passes over it.
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t t = 0; t < num_tiles; ++t)
      scan_tile<Vec, kRows, kVectors>(row_tiles + t * channels * kRows,
                                      code_blocks + b * channels * kVectors * Vec::kLanes, channels,
                                      first_vector + static_cast<int32_t>(b) * kVectors,
                                      best + t * kRows * Vec::kLanes, best_vector + t * kRows * Vec::kLanes);
}

template <class Vec, int kRows, int kVectors>
constexpr VqScanKernel make_scan_kernel() {
  return {kRows, Vec::kLanes, kVectors * Vec::kLanes, scan<Vec, kRows, kVectors>};
}

}  // namespace
}  // namespace dcar
