// The inner loop of vq_lookup as one table entry per instruction set. Kept apart from vq_lookup.h so that the files
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
#endif

}  // namespace dcar
