// The k lowest of a row of keys, which re-masking and placing tokens share.
//
// Not for files that are compiled per instruction set: the linker keeps one copy of a template for everyone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dcar {

// The lowest positions of a row are those with key < threshold, and the first `ties` of those with key == threshold.
template <class Key>
struct Cut {
  Key threshold;
  int64_t ties;
};

// Bisects the values for the k-th smallest key, 0 < k < count: counting has no branch that a CPU could mispredict and
// compiles to vector code, which a sort or a partition does not. Stops as soon as a value splits off exactly k.
template <class Key>
Cut<Key> lowest(const Key* keys, int64_t count, int64_t k) {
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  int64_t below = 0;  // keys < low
  while (low < high) {
    const Key middle = (low & high) + ((low ^ high) >> 1);  // the mean, rounded down, without overflow
    Key up_to = 0;
    for (int64_t i = 0; i < count; ++i) up_to += keys[i] <= middle;
    if (up_to == k) return {middle, count};
    if (up_to > k) {
      high = middle;
    } else {
      low = middle + 1;
      below = up_to;
    }
  }
  return {low, k - below};
}

}  // namespace dcar
