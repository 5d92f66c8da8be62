#include "place_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <omp.h>

#include "philox.h"
#include "rank.h"
#include "remask.h"

namespace dcar {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;
// Below this many tokens starting threads costs more than it saves: a token with noise takes some 30 ns.
constexpr int64_t kTokensPerThread = 1024;

void check(const char* name, int64_t row, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(value) + " in row " + std::to_string(row) +
                                ", allowed are 0.." + std::to_string(most));
}

void check_values(const PlaceTokens& task) {
  for (int64_t row = 0; row < task.batch; ++row) {
    for (int64_t i = 0; task.rows.data != nullptr && i < task.sampled; ++i)
      check("rows", row, task.rows[row][i], task.tokens - 1);
    if (task.noise != PlaceTokens::kNone) check("num_masked", row, task.num_masked[row], task.tokens);
    if (task.noise == PlaceTokens::kCounter)
      check("noise.seeds", row, task.seeds[row], std::numeric_limits<int64_t>::max());
  }
}

// The float32 formula of the reference, with its clamps.
float gumbel(float u) { return -std::log(std::max(-std::log(std::max(u, 1e-20f)), 1e-20f)); }

float uniform(const PlaceTokens& task, int64_t row, int64_t position) {
  if (task.noise == PlaceTokens::kUniforms) return task.uniforms[row][position];
  const uint64_t seed = static_cast<uint64_t>(task.seeds[row]);
  const PhiloxWords counter = {{0, static_cast<uint32_t>(position), task.step, kStreamConfidence}};
  return philox_uniform(philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).word[0]);
}

// What a position ranks by: below +infinity even for an infinite confidence; NaN is lowest.
int32_t key_of(const PlaceTokens& task, int64_t row, int64_t position, float confidence) {
  const float noise = task.tau * gumbel(uniform(task, row, position));
  float value = confidence + noise;
  if (value > std::numeric_limits<float>::max()) value = std::numeric_limits<float>::max();
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return rank_key(bits, kInfinityBits);
}

// The sampled ids in the open positions, and with noise the keys of all positions.
void place(const PlaceTokens& task, int64_t row, int64_t* out, int32_t* keys) {
  const int64_t* ids = task.ids[row];
  std::copy(ids, ids + task.tokens, out);
  const bool masks = task.noise != PlaceTokens::kNone;
  if (masks) std::fill(keys, keys + task.tokens, kInfinityBits);
  for (int64_t i = 0; i < task.sampled; ++i) {
    const int64_t position = task.rows.data == nullptr ? i : task.rows[row][i];
    if (ids[position] != task.mask_id) continue;
    out[position] = task.chosen[row][i];
    if (masks) keys[position] = key_of(task, row, position, task.confidence[row][i]);
  }
}

void mask_lowest(const int32_t* keys, int64_t count, int64_t k, int64_t mask_id, int64_t* out) {
  if (k == 0) return;
  if (k == count) return std::fill(out, out + count, mask_id);
  Cut<int32_t> cut = lowest(keys, count, k);
  for (int64_t i = 0; i < count; ++i)
    if (keys[i] < cut.threshold || (keys[i] == cut.threshold && cut.ties-- > 0)) out[i] = mask_id;
}

// The positions of mask_id, then the others, as far as there is room.
void list_rows(const int64_t* ids, int64_t tokens, int64_t mask_id, int64_t* rows, int64_t room) {
  for (const bool open : {true, false})
    for (int64_t i = 0; i < tokens && room > 0; ++i)
      if ((ids[i] == mask_id) == open) {
        *rows++ = i;
        --room;
      }
}

}  // namespace

void place_tokens(const PlaceTokens& task, int num_threads) {
  check_values(task);
  const int64_t useful = std::max<int64_t>(1, task.batch * task.tokens / kTokensPerThread);
  const int threads = static_cast<int>(std::min<int64_t>({num_threads, std::max<int64_t>(task.batch, 1), useful}));
  std::vector<int32_t> all_keys(threads * task.tokens);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < task.batch; ++row) {
    int64_t* out = task.new_ids + row * task.tokens;
    int32_t* keys = all_keys.data() + omp_get_thread_num() * task.tokens;
    place(task, row, out, keys);
    if (task.noise != PlaceTokens::kNone) mask_lowest(keys, task.tokens, task.num_masked[row], task.mask_id, out);
    list_rows(out, task.tokens, task.mask_id, task.next_rows + row * task.next_open, task.next_open);
  }
}

}  // namespace dcar
