// The inner loops of vq_lookup as table entries per instruction set. Kept apart from vq_lookup.h so that the files
// compiled for one instruction set include nothing else.
#pragma once

#include <cstdint>

namespace dcar {

struct VqScanKernel {
  int rows;   // rows in one tile
  int lanes;  // codes in one vector
  int codes;  // codes in one packed block, a multiple of lanes

  // Compares `num_tiles` row tiles with `num_blocks` code blocks, the first of which starts at vector `first_vector`
  // of the codebook, and keeps the larger score and its vector's number, per row and lane. Layouts: vq_scan_impl.h.
  void (*scan)(const float* row_tiles, int64_t num_tiles, const float* code_blocks, int64_t num_blocks,
               int64_t channels, int32_t first_vector, float* best, int32_t* best_vector);
};

extern const VqScanKernel kVqScanGeneric;
#ifdef DCAR_FAST_X86
extern const VqScanKernel kVqScanAvx2;
extern const VqScanKernel kVqScanAvx512;
extern const VqScanKernel kVqScanAvx512Row;  // tiles of one row, the same scores to the last bit
#endif

// A code block that may hold a row's best code, and the largest integer score in it.
struct VqCandidate {
  int32_t block;
  int32_t top;
};

constexpr int kVqFilterRows = 6;        // rows in one tile
constexpr int kVqFilterCodes = 64;      // codes in one block, that of kVqScanAvx512
constexpr int32_t kVqNeverCandidate = -2000000000;  // bias of codes that must not be found
constexpr int32_t kVqNoThreshold = -1900000000;     // below the score of every other code

// What vq_filter needs of a panel of rows. Arrays run over rows; what it is all about: vq_filter.h.
struct VqFilterRows {
  const int32_t* tiles;   // (tiles, groups, kVqFilterRows): four signed bytes, one per channel of a group
  const int32_t* window;  // how far below the largest score so far a block's largest may lie
  int32_t* threshold;     // largest score so far minus window; starts as kVqNoThreshold
  VqCandidate* found;     // (rows, capacity)
  int32_t* num_found;
  int64_t capacity;       // at least the number of blocks
};

#ifdef DCAR_FAST_X86
// Scores `num_tiles` row tiles against `num_blocks` code blocks (groups, kVqFilterCodes) of four unsigned bytes each,
// plus bias (blocks, kVqFilterCodes), and appends per row the blocks that reach the threshold of that moment.
void vq_filter_avx512vnni(const VqFilterRows& rows, int64_t num_tiles, const uint8_t* code_blocks, const int32_t* bias,
                          int64_t num_blocks, int64_t groups);
#endif

}  // namespace dcar
