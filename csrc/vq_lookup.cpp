#include "vq_lookup.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include <omp.h>

#include "normalise.h"
#include "vq_scan.h"

namespace dcar {
namespace {

constexpr int64_t kPackedFloats = int64_t{4} << 20;  // packed slice of the codebook: 16 MB
constexpr int64_t kPanelFloats = 4096;               // rows a task keeps in the first-level cache: 16 KB
constexpr int64_t kPanelTiles = 16;                  // at most, so that the running maxima fit beside them
constexpr int64_t kTasksPerThread = 8;               // enough that uneven threads even out

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned to cache lines, so that no vector load straddles two.
template <class T>
Buffer<T> allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

const VqScanKernel& scan_kernel(const std::string& isa) {
#ifdef DCAR_FAST_X86
  if (isa == "avx512") return kVqScanAvx512;
  if (isa == "avx2") return kVqScanAvx2;
#endif
  if (isa == "generic") return kVqScanGeneric;
  throw std::invalid_argument("no vq_lookup kernel for the instruction set " + isa);
}

struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int64_t id = 0;
};

// Normalises `count` codes and lays them out as one code block, (channels, width). Lanes beyond `count` hold NaN,
// which never wins; a zero would beat negative cosines.
void pack_codes(const float* codebook, int64_t count, int64_t channels, int width, float* scratch, float* block) {
  for (int lane = 0; lane < width; ++lane) {
    if (lane < count)
      normalise(codebook + lane * channels, channels, scratch);
    else
      std::fill_n(scratch, channels, std::numeric_limits<float>::quiet_NaN());
    for (int64_t c = 0; c < channels; ++c) block[c * width + lane] = scratch[c];
  }
}

// Normalises `count` rows and interleaves them in tiles, (tiles, channels, rows per tile). Rows beyond `count` in the
// last tile are zero: they are scored and thrown away.
void pack_rows(const float* z, int64_t count, int64_t channels, int tile_rows, float* scratch, float* tiles) {
  const int64_t padded = divide_up(count, tile_rows) * tile_rows;
  for (int64_t row = 0; row < padded; ++row) {
    if (row < count)
      normalise(z + row * channels, channels, scratch);
    else
      std::fill_n(scratch, channels, 0.0f);
    float* tile = tiles + row / tile_rows * channels * tile_rows + row % tile_rows;
    for (int64_t c = 0; c < channels; ++c) tile[c * tile_rows] = scratch[c];
  }
}

// Reduces the lanes of one row: largest score, lowest id among equal ones.
Best reduce_lanes(const float* best, const int32_t* best_vector, int lanes) {
  Best top;
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t id = int64_t{best_vector[lane]} * lanes + lane;
    if (best[lane] > top.score || (best[lane] == top.score && id < top.id)) top = {best[lane], id};
  }
  return top;
}

// How rows and one slice of the codebook are cut into tasks. Few rows: the codes are split too, to use every thread.
struct Plan {
  int64_t panel_rows, panels, splits, blocks_per_split;

  Plan(int64_t rows, int64_t slice_blocks, int64_t channels, int num_threads, const VqScanKernel& kernel) {
    const int64_t tiles = std::clamp(kPanelFloats / (channels * kernel.rows), int64_t{2}, kPanelTiles);
    panel_rows = std::min(tiles, divide_up(rows, kernel.rows)) * kernel.rows;
    panels = divide_up(rows, panel_rows);
    const int64_t wanted = num_threads == 1 ? 1 : divide_up(kTasksPerThread * num_threads, panels);
    blocks_per_split = divide_up(slice_blocks, std::min(wanted, slice_blocks));
    splits = divide_up(slice_blocks, blocks_per_split);
  }
};

}  // namespace

void vq_lookup(const float* z, const float* codebook, int64_t* ids, float* codes, float* residual, int64_t rows,
               int64_t num_codes, int64_t channels, int num_threads, const std::string& isa) {
  const VqScanKernel& kernel = scan_kernel(isa);
  if (rows == 0) return;

  const int64_t block_floats = channels * kernel.codes;
  const int64_t all_blocks = divide_up(num_codes, kernel.codes);
  const int64_t slice_blocks = std::clamp(kPackedFloats / block_floats, int64_t{1}, all_blocks);
  const Plan plan(rows, slice_blocks, channels, num_threads, kernel);

  // All memory is taken here: an exception must not leave a parallel region.
  const int64_t lane_slots = plan.panel_rows * kernel.lanes;
  const int64_t scratch_floats = divide_up(channels, 16) * 16;  // whole cache lines: threads share none
  Buffer<float> packed = allocate<float>(slice_blocks * block_floats);
  Buffer<float> scratch = allocate<float>(num_threads * scratch_floats);
  Buffer<float> panel_rows = allocate<float>(num_threads * plan.panel_rows * channels);
  Buffer<float> panel_best = allocate<float>(num_threads * lane_slots);
  Buffer<int32_t> panel_vector = allocate<int32_t>(num_threads * lane_slots);
  std::vector<Best> best(rows), partial(plan.splits * rows);

  for (int64_t first_block = 0; first_block < all_blocks; first_block += slice_blocks) {
    const int64_t num_blocks = std::min(slice_blocks, all_blocks - first_block);

#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      const int thread = omp_get_thread_num();
      float* my_scratch = scratch.get() + thread * scratch_floats;
      float* my_rows = panel_rows.get() + thread * plan.panel_rows * channels;
      float* my_best = panel_best.get() + thread * lane_slots;
      int32_t* my_vector = panel_vector.get() + thread * lane_slots;

#pragma omp for schedule(static)
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t first = (first_block + b) * kernel.codes;
        pack_codes(codebook + first * channels, std::min<int64_t>(kernel.codes, num_codes - first), channels,
                   kernel.codes, my_scratch, packed.get() + b * block_floats);
      }

#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < plan.panels * plan.splits; ++task) {
        const int64_t split = task % plan.splits;
        const int64_t first_row = task / plan.splits * plan.panel_rows;
        const int64_t count = std::min(plan.panel_rows, rows - first_row);
        const int64_t begin = std::min(num_blocks, split * plan.blocks_per_split);
        const int64_t end = std::min(num_blocks, begin + plan.blocks_per_split);

        pack_rows(z + first_row * channels, count, channels, kernel.rows, my_scratch, my_rows);
        std::fill_n(my_best, lane_slots, -std::numeric_limits<float>::infinity());
        std::fill_n(my_vector, lane_slots, 0);
        kernel.scan(my_rows, divide_up(count, kernel.rows), packed.get() + begin * block_floats, end - begin, channels,
                    static_cast<int32_t>((first_block + begin) * (kernel.codes / kernel.lanes)), my_best, my_vector);
        for (int64_t r = 0; r < count; ++r)
          partial[split * rows + first_row + r] =
              reduce_lanes(my_best + r * kernel.lanes, my_vector + r * kernel.lanes, kernel.lanes);
      }

      // Splits and slices are merged in the codebook's order with a strict comparison: the lowest id keeps a tie.
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t split = 0; split < plan.splits; ++split)
          if (partial[split * rows + row].score > best[row].score) best[row] = partial[split * rows + row];
    }
  }

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    float* code = codes + row * channels;
    float* rest = residual + row * channels;
    ids[row] = best[row].id;
    normalise(codebook + best[row].id * channels, channels, code);
    normalise(z + row * channels, channels, rest);
    for (int64_t c = 0; c < channels; ++c) rest[c] -= code[c];
  }
}

}  // namespace dcar
