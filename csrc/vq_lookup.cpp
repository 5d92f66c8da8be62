#include "vq_lookup.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include <omp.h>

#include "cpu_isa.h"
#include "vq_filter.h"
#include "vq_scan.h"

namespace dcar {
namespace {

constexpr int64_t kPackedFloats = int64_t{4} << 20;  // packed slice of the codebook: 16 MB, and a quarter in bytes
constexpr int64_t kFilterBlocks = 512;               // of a slice, at most: what a row may find is bounded by it
constexpr int64_t kPanelFloats = 4096;               // rows a task keeps in the first-level cache: 16 KB
constexpr int64_t kPanelTiles = 16;                  // at most, so that the running maxima fit beside them
constexpr int64_t kTasksPerThread = 8;               // enough that uneven threads even out
constexpr int64_t kLine = 64;                        // bytes of a cache line, which no two threads shall share
constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of one thread after the other, each its own cache lines; with one thread simply an array.
template <class T>
struct Buffer {
  int64_t stride;
  std::unique_ptr<T[], Free> memory;

  explicit Buffer(int64_t count, int64_t threads = 1)
      : stride(divide_up(count * sizeof(T), kLine) * kLine / sizeof(T)) {
    memory.reset(static_cast<T*>(std::aligned_alloc(kLine, std::max<int64_t>(stride * threads * sizeof(T), kLine))));
    if (memory == nullptr) throw std::bad_alloc();
  }
  T* get(int64_t thread = 0) const { return memory.get() + thread * stride; }
};

const VqScanKernel& scan_kernel(const std::string& isa) {
#ifdef DCAR_FAST_X86
  if (isa == "avx512vnni" || isa == "avx512") return kVqScanAvx512;
  if (isa == "avx2") return kVqScanAvx2;
#endif
  if (isa == "generic") return kVqScanGeneric;
  throw std::invalid_argument("no vq_lookup kernel for the instruction set " + isa);
}

struct Best {
  float score = kLowest;
  int64_t id = 0;
};

// Normalises the codes first.. of a codebook and lays them out as one code block, (channels, width). Lanes beyond the
// last code hold NaN, which never wins; a zero would beat negative cosines.
void pack_codes(const VqVectors& codebook, int64_t first, int width, float* scratch, float* block) {
  for (int lane = 0; lane < width; ++lane) {
    if (first + lane < codebook.count)
      codebook.normalise_to(first + lane, scratch);
    else
      std::fill_n(scratch, codebook.channels, std::numeric_limits<float>::quiet_NaN());
    for (int64_t c = 0; c < codebook.channels; ++c) block[c * width + lane] = scratch[c];
  }
}

// Interleaves `count` normalised rows in tiles, (tiles, channels, rows per tile). Rows beyond `count` in the last tile
// are zero: they are scored and thrown away.
void pack_rows(const float* rows, int64_t count, int64_t channels, int tile_rows, float* tiles) {
  for (int64_t row = 0; row < divide_up(count, tile_rows) * tile_rows; ++row) {
    float* tile = tiles + row / tile_rows * channels * tile_rows + row % tile_rows;
    for (int64_t c = 0; c < channels; ++c) tile[c * tile_rows] = row < count ? rows[row * channels + c] : 0.0f;
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

// The blocks of the codebook that a task compares its rows with; `first` counts from the start of the codebook.
struct Blocks {
  const float* packed;
  int64_t first, count, channels;
};

// What one thread needs to compare a panel of rows with float32 scores.
struct Scanner {
  const VqScanKernel& kernel;
  float *tiles, *best;
  int32_t* best_vector;

  void reset(int64_t rows) const {
    std::fill_n(best, rows * kernel.lanes, kLowest);
    std::fill_n(best_vector, rows * kernel.lanes, 0);
  }

  // One row against one block; `row_kernel` has tiles of one row.
  void add(const VqScanKernel& row_kernel, const float* row, int64_t slot, const Blocks& blocks, int64_t block) const {
    row_kernel.scan(row, 1, blocks.packed + block * blocks.channels * kernel.codes, 1, blocks.channels,
                    vector_of(blocks.first + block), best + slot * kernel.lanes, best_vector + slot * kernel.lanes);
  }

  void scan(const float* rows, int64_t count, const Blocks& blocks) const {
    pack_rows(rows, count, blocks.channels, kernel.rows, tiles);
    reset(divide_up(count, kernel.rows) * kernel.rows);
    kernel.scan(tiles, divide_up(count, kernel.rows), blocks.packed, blocks.count, blocks.channels,
                vector_of(blocks.first), best, best_vector);
  }

  Best result(int64_t row) const {
    return reduce_lanes(best + row * kernel.lanes, best_vector + row * kernel.lanes, kernel.lanes);
  }

  int32_t vector_of(int64_t block) const { return static_cast<int32_t>(block * (kernel.codes / kernel.lanes)); }
};

#ifdef DCAR_FAST_X86
// The codes of a slice as 8-bit integers; see vq_filter.h.
struct FilterCodes {
  Buffer<uint8_t> bytes;
  Buffer<int32_t> bias;
  float step = 0.0f, error = 0.0f;
};

// What one thread needs to rule out blocks for a panel of rows before it scores the others.
struct Filter {
  const FilterCodes& codes;
  int32_t *tiles, *window, *threshold, *num_found;
  VqCandidate* found;
  int64_t capacity;

  // As scanner.scan, to the last bit.
  void scan(const float* rows, int64_t count, const Blocks& blocks, int64_t first_in_slice, const Scanner& scanner) {
    const int64_t channels = blocks.channels, groups = divide_up(channels, 4);
    const int64_t padded = divide_up(count, kVqFilterRows) * kVqFilterRows;
    for (int64_t r = 0; r < padded; ++r) {
      num_found[r] = 0;
      int32_t* words = tiles + r / kVqFilterRows * groups * kVqFilterRows + r % kVqFilterRows;
      if (r < count) {
        vq_quantise_row(rows + r * channels, channels, codes.error, codes.step, kVqFilterRows, words, window + r,
                        threshold + r);
      } else {
        for (int64_t g = 0; g < groups; ++g) words[g * kVqFilterRows] = 0;
        threshold[r] = std::numeric_limits<int32_t>::max();
      }
    }
    vq_filter_avx512vnni({tiles, window, threshold, found, num_found, capacity}, padded / kVqFilterRows,
                         codes.bytes.get() + first_in_slice * groups * 4 * kVqFilterCodes,
                         codes.bias.get() + first_in_slice * kVqFilterCodes, blocks.count, groups);

    // Thresholds have risen since: most of what was found early falls out.
    int64_t left = 0;
    for (int64_t r = 0; r < count; ++r) {
      VqCandidate* mine = found + r * capacity;
      const int32_t reach = threshold[r];
      num_found[r] = static_cast<int32_t>(
          std::remove_if(mine, mine + num_found[r], [reach](const VqCandidate& c) { return c.top < reach; }) - mine);
      left += num_found[r];
    }
    // Codes that are all alike: six rows at a time are faster than most blocks one by one.
    if (2 * left > count * blocks.count) return scanner.scan(rows, count, blocks);
    scanner.reset(count);
    for (int64_t r = 0; r < count; ++r)
      for (int32_t i = 0; i < num_found[r]; ++i)
        scanner.add(kVqScanAvx512Row, rows + r * channels, r, blocks, found[r * capacity + i].block);
  }
};
#endif

}  // namespace

const std::vector<std::string>& vq_lookup_isas() {
  static const std::vector<std::string> isas = [] {
    std::vector<std::string> found = usable_isas();
    if (has_avx512vnni()) found.insert(found.begin(), "avx512vnni");
    return found;
  }();
  return isas;
}

void vq_lookup(const VqVectors& z, const VqVectors& codebook, int64_t* ids, float* codes, float* residual,
               int num_threads, const std::string& isa) {
  const VqScanKernel& kernel = scan_kernel(isa);
  const int64_t rows = z.count, channels = z.channels;
  if (rows == 0) return;
  const bool filtering = isa == "avx512vnni" && channels <= kVqFilterChannels;

  const int64_t block_floats = channels * kernel.codes;
  const int64_t all_blocks = divide_up(codebook.count, kernel.codes);
  const int64_t most_blocks = filtering ? std::min(all_blocks, kFilterBlocks) : all_blocks;
  const int64_t slice_blocks = std::clamp(kPackedFloats / block_floats, int64_t{1}, most_blocks);
  const Plan plan(rows, slice_blocks, channels, num_threads, kernel);

  // All memory is taken here: an exception must not leave a parallel region.
  Buffer<float> packed(slice_blocks * block_floats);
  Buffer<float> scratch(channels, num_threads);
  Buffer<float> panel_rows(plan.panel_rows * channels, num_threads), panel_tiles(panel_rows.stride, num_threads);
  Buffer<float> panel_best(plan.panel_rows * kernel.lanes, num_threads);
  Buffer<int32_t> panel_vector(plan.panel_rows * kernel.lanes, num_threads);
  std::vector<Best> best(rows), partial(plan.splits * rows);
#ifdef DCAR_FAST_X86
  const int64_t groups = divide_up(channels, 4), filters = filtering ? 1 : 0;
  FilterCodes bytes{Buffer<uint8_t>(filters * slice_blocks * groups * 4 * kVqFilterCodes),
                    Buffer<int32_t>(filters * slice_blocks * kVqFilterCodes)};
  Buffer<int32_t> words(filters * plan.panel_rows * groups, num_threads);
  Buffer<int32_t> windows(filters * plan.panel_rows, num_threads), thresholds(windows.stride, num_threads);
  Buffer<int32_t> num_found(windows.stride, num_threads);
  Buffer<VqCandidate> found(filters * plan.panel_rows * plan.blocks_per_split, num_threads);
#endif

  for (int64_t first_block = 0; first_block < all_blocks; first_block += slice_blocks) {
    const int64_t num_blocks = std::min(slice_blocks, all_blocks - first_block);
    float largest = 0.0f, error = 0.0f;

#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      const int thread = omp_get_thread_num();
      float* my_rows = panel_rows.get(thread);
      const Scanner scanner{kernel, panel_tiles.get(thread), panel_best.get(thread), panel_vector.get(thread)};

#pragma omp for schedule(static) reduction(max : largest)
      for (int64_t b = 0; b < num_blocks; ++b) {
        float* block = packed.get() + b * block_floats;
        pack_codes(codebook, (first_block + b) * kernel.codes, kernel.codes, scratch.get(thread), block);
        if (filtering) largest = std::max(largest, vq_largest(block, block_floats));
      }
#ifdef DCAR_FAST_X86
      if (filtering) {
#pragma omp for schedule(static) reduction(max : error)
        for (int64_t b = 0; b < num_blocks; ++b) {
          const int64_t count = codebook.count - (first_block + b) * kernel.codes;
          error = std::max(error, vq_quantise_codes(packed.get() + b * block_floats, count, channels, largest / 127.0f,
                                                    bytes.bytes.get() + b * groups * 4 * kVqFilterCodes,
                                                    bytes.bias.get() + b * kVqFilterCodes));
        }
#pragma omp single
        bytes.step = largest / 127.0f, bytes.error = error;
      }
      Filter filter{bytes, words.get(thread), windows.get(thread), thresholds.get(thread), num_found.get(thread),
                    found.get(thread), plan.blocks_per_split};
#endif

#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < plan.panels * plan.splits; ++task) {
        const int64_t split = task % plan.splits;
        const int64_t first_row = task / plan.splits * plan.panel_rows;
        const int64_t count = std::min(plan.panel_rows, rows - first_row);
        const int64_t begin = std::min(num_blocks, split * plan.blocks_per_split);
        const int64_t end = std::min(num_blocks, begin + plan.blocks_per_split);
        const Blocks blocks{packed.get() + begin * block_floats, first_block + begin, end - begin, channels};

        for (int64_t r = 0; r < count; ++r) z.normalise_to(first_row + r, my_rows + r * channels);
#ifdef DCAR_FAST_X86
        if (filtering)
          filter.scan(my_rows, count, blocks, begin, scanner);
        else
#endif
          scanner.scan(my_rows, count, blocks);
        for (int64_t r = 0; r < count; ++r) partial[split * rows + first_row + r] = scanner.result(r);
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
    codebook.normalise_to(best[row].id, code);
    z.normalise_to(row, rest);
    for (int64_t c = 0; c < channels; ++c) rest[c] -= code[c];
  }
}

}  // namespace dcar
