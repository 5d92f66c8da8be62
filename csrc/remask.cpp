#include "remask.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include <omp.h>

#include "rank.h"

namespace dcar {
namespace {

// Below this many elements starting threads costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 16;

template <class Key, class Bits>
void remask_row(const Remask& task, int64_t row, Key infinity, Key* keys) {
  const int64_t* ids = task.ids + row * task.ids_row;
  int64_t* out = task.out + row * task.tokens;
  const int64_t k = task.num_masked[row * task.num_masked_row];
  if (k == 0 || k == task.tokens) {
    for (int64_t i = 0; i < task.tokens; ++i) out[i] = k == 0 ? ids[i * task.ids_column] : task.mask_id;
    return;
  }
  const Bits* confidence = static_cast<const Bits*>(task.confidence) + row * task.confidence_row;
  for (int64_t i = 0; i < task.tokens; ++i) keys[i] = rank_key(confidence[i * task.confidence_column], infinity);
  Cut<Key> cut = lowest(keys, task.tokens, k);
  for (int64_t i = 0; i < task.tokens; ++i) {
    const bool masked = keys[i] < cut.threshold || (keys[i] == cut.threshold && cut.ties-- > 0);
    out[i] = masked ? task.mask_id : ids[i * task.ids_column];
  }
}

template <class Key, class Bits>
void remask_rows(const Remask& task, Key infinity, int num_threads) {
  const int64_t useful = std::max<int64_t>(1, task.rows * task.tokens / kElementsPerThread);
  const int threads = static_cast<int>(std::min<int64_t>({num_threads, task.rows, useful}));
  std::vector<Key> keys(threads * task.tokens);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < task.rows; ++row)
    remask_row<Key, Bits>(task, row, infinity, keys.data() + omp_get_thread_num() * task.tokens);
}

}  // namespace

void remask_cpu(const Remask& task, int num_threads) {
  for (int64_t row = 0; row < task.rows; ++row)
    if (const int64_t k = task.num_masked[row * task.num_masked_row]; k < 0 || k > task.tokens)
      throw std::invalid_argument("num_masked: element " + std::to_string(row) + " is " + std::to_string(k) +
                                  ", allowed are 0.." + std::to_string(task.tokens));
  if (task.rows == 0 || task.tokens == 0) return;
  switch (task.type) {
    case FloatType::kFloat16:
      return remask_rows<int32_t, int16_t>(task, 0x7c00, num_threads);
    case FloatType::kBFloat16:
      return remask_rows<int32_t, int16_t>(task, 0x7f80, num_threads);
    case FloatType::kFloat32:
      return remask_rows<int32_t, int32_t>(task, 0x7f800000, num_threads);
    case FloatType::kFloat64:
      return remask_rows<int64_t, int64_t>(task, 0x7ff0000000000000, num_threads);
  }
}

}  // namespace dcar
