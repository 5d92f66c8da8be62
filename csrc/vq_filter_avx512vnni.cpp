// Compiled with -mavx512f -mavx512vnni: reached only when the CPU has both.
//
// GCC 12 takes the placeholders inside its own intrinsics for variables that are read before they are set (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "vq_scan.h"

namespace dcar {
namespace {

constexpr int kVectors = kVqFilterCodes / 16;

// Not __m512i, whose lanes are 64 bits wide: casting that back and forth makes GCC keep an array of it in memory.
typedef int32_t Int __attribute__((vector_size(64)));

inline Int load(const void* p) { return (Int)_mm512_loadu_si512(p); }
inline Int larger(Int a, Int b) { return (Int)_mm512_max_epi32((__m512i)a, (__m512i)b); }

// Seldom reached, and kept out of the loop: a call in its midst would move the accumulators to memory.
__attribute__((noinline)) void note(const VqFilterRows& rows, int64_t first_row, int32_t block, const Int* tops) {
  for (int64_t row = first_row; row < first_row + kVqFilterRows; ++row) {
    const int32_t top = _mm512_reduce_max_epi32((__m512i)tops[row - first_row]);
    if (top < rows.threshold[row]) continue;
    rows.found[row * rows.capacity + rows.num_found[row]++] = {block, top};
    rows.threshold[row] = top - rows.window[row] > rows.threshold[row] ? top - rows.window[row] : rows.threshold[row];
  }
}

// 6 rows x 4 vectors: 24 accumulators, 4 code vectors and 1 broadcast of 32 registers.
inline void filter_tile(const VqFilterRows& rows, int64_t first_row, const int32_t* tile, const uint8_t* codes,
                        const int32_t* bias, int32_t block, int64_t groups) {
  Int score[kVqFilterRows][kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Int start = load(bias + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < kVqFilterRows; ++r) score[r][v] = start;
  }
  for (int64_t g = 0; g < groups; ++g) {
    Int code[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) code[v] = load(codes + 64 * v);
#pragma GCC unroll 16
    for (int r = 0; r < kVqFilterRows; ++r) {
      const __m512i value = _mm512_set1_epi32(tile[r]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        score[r][v] = (Int)_mm512_dpbusd_epi32((__m512i)score[r][v], (__m512i)code[v], value);
    }
    tile += kVqFilterRows;
    codes += 4 * kVqFilterCodes;
  }
  Int tops[kVqFilterRows];
  __mmask16 reached = 0;
#pragma GCC unroll 16
  for (int r = 0; r < kVqFilterRows; ++r) {
    tops[r] = larger(larger(score[r][0], score[r][1]), larger(score[r][2], score[r][3]));
    reached |= _mm512_cmpge_epi32_mask((__m512i)tops[r], _mm512_set1_epi32(rows.threshold[first_row + r]));
  }
  if (__builtin_expect(reached != 0, 0)) note(rows, first_row, block, tops);
}

}  // namespace

void vq_filter_avx512vnni(const VqFilterRows& rows, int64_t num_tiles, const uint8_t* code_blocks, const int32_t* bias,
                          int64_t num_blocks, int64_t groups) {
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t t = 0; t < num_tiles; ++t)
      filter_tile(rows, t * kVqFilterRows, rows.tiles + t * groups * kVqFilterRows,
                  code_blocks + b * groups * 4 * kVqFilterCodes, bias + b * kVqFilterCodes, static_cast<int32_t>(b),
                  groups);
}

}  // namespace dcar
