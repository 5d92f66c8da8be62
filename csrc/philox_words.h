// Philox4x32-10 over arrays, for the tests that compare the languages' words; the function itself is in philox.h.
#pragma once

#include <cstdint>
#include <string>

namespace dcar {

// counters (count, 4) and keys (count, 2) -> words (count, 4), on the current CUDA device, enqueued on `stream`.
// Returns an empty string, or the CUDA error.
std::string philox_words_cuda(const uint32_t* counters, const uint32_t* keys, uint32_t* words, int64_t count,
                              void* stream);

}  // namespace dcar
