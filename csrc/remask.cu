#include "remask.h"

#include <algorithm>

#include <cuda_runtime.h>

namespace dcar {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kCached = 4096;  // keys of a row that fit in static shared memory; more are formed anew in every pass
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

struct Choice {
  int digit;
  int remaining;  // how many keys with this digit are still to be taken
  int there;      // how many keys have it
};

// In one warp: the bin in which the k-th smallest of the counted digits lies, 1 <= k <= their number.
__device__ Choice find_bin(const int* counts, int k) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x;
  int own = 0;
  for (int i = 0; i < kEach; ++i) own += counts[lane * kEach + i];
  int up_to = own;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, up_to, step);
    if (lane >= step) up_to += other;
  }
  const int source = __ffs(__ballot_sync(0xffffffffu, up_to >= k)) - 1;
  int before = up_to - own;
  int digit = lane * kEach;
  while (digit < lane * kEach + kEach - 1 && before + counts[digit] < k) before += counts[digit++];
  digit = __shfl_sync(0xffffffffu, digit, source);
  return {digit, k - __shfl_sync(0xffffffffu, before, source), counts[digit]};
}

// One block per row. A radix select finds the k-th smallest key digit by digit from the top: `prefix` are the digits it
// is known to start with, and `remaining` says how many keys that start so are still to be taken. It ends early when
// that is all of them. Ties are then given to the first in order of index.
template <class Key, class Bits, class Unsigned>
__global__ void __launch_bounds__(kMaxThreads) remask_kernel(Remask task, Key infinity) {
  __shared__ Unsigned cache[kCached];
  __shared__ int counts[kBins];
  __shared__ int ties_of_warp[kMaxThreads / 32];
  __shared__ Choice choice;

  const int tokens = static_cast<int>(task.tokens);
  const int64_t row = blockIdx.x;
  const int64_t* ids = task.ids + row * task.ids_row;
  const Bits* confidence = static_cast<const Bits*>(task.confidence) + row * task.confidence_row;
  int64_t* out = task.out + row * task.tokens;
  const int64_t wanted = task.num_masked[row * task.num_masked_row];
  const int k = static_cast<int>(wanted < 0 ? 0 : wanted > tokens ? tokens : wanted);
  if (k == 0 || k == tokens) {
    for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) out[i] = k == 0 ? ids[i * task.ids_column] : task.mask_id;
    return;
  }

  constexpr Unsigned kSign = Unsigned{1} << (8 * sizeof(Unsigned) - 1);  // turns signed order into unsigned order
  const auto form_key = [&](int64_t i) {
    return static_cast<Unsigned>(rank_key<Key>(confidence[i * task.confidence_column], infinity)) ^ kSign;
  };
  const bool cached = tokens <= kCached;
  if (cached)
    for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) cache[i] = form_key(i);
  const auto key = [&](int64_t i) { return cached ? cache[i] : form_key(i); };

  Unsigned prefix = 0;
  int remaining = k, there = tokens;
  int shift = 8 * sizeof(Unsigned);
  while (shift > 0 && remaining < there) {
    shift -= kDigitBits;
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) counts[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) {
      const Unsigned digits = key(i) >> shift;
      if (digits >> kDigitBits == prefix) atomicAdd(&counts[digits % kBins], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const Choice found = find_bin(counts, remaining);
      if (threadIdx.x == 0) choice = found;
    }
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<Unsigned>(choice.digit);
    remaining = choice.remaining;
    there = choice.there;
  }

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const bool all_ties = remaining == there;
  int seen = 0;  // ties at lower indices
  for (int64_t first = 0; first < tokens; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const bool live = i < tokens;
    const Unsigned digits = live ? key(i) >> shift : 0;
    const bool tie = live && digits == prefix;
    bool masked = tie || digits < prefix;
    if (!all_ties) {  // the same for the whole block
      const unsigned ties = __ballot_sync(0xffffffffu, tie);
      if (lane == 0) ties_of_warp[warp] = __popc(ties);
      __syncthreads();
      int rank = seen + __popc(ties & ((1u << lane) - 1));
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        if (w < warp) rank += ties_of_warp[w];
        seen += ties_of_warp[w];
      }
      __syncthreads();
      if (tie) masked = rank < remaining;
    }
    if (live) out[i] = masked ? task.mask_id : ids[i * task.ids_column];
  }
}

template <class Key, class Bits, class Unsigned>
void launch(const Remask& task, Key infinity, cudaStream_t stream) {
  const int threads = static_cast<int>(std::min<int64_t>((task.tokens + 31) / 32 * 32, kMaxThreads));
  remask_kernel<Key, Bits, Unsigned><<<static_cast<unsigned>(task.rows), threads, 0, stream>>>(task, infinity);
}

}  // namespace

std::string remask_cuda(const Remask& task, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (task.type) {
    case FloatType::kFloat16:
      launch<int32_t, int16_t, uint32_t>(task, 0x7c00, on);
      break;
    case FloatType::kBFloat16:
      launch<int32_t, int16_t, uint32_t>(task, 0x7f80, on);
      break;
    case FloatType::kFloat32:
      launch<int32_t, int32_t, uint32_t>(task, 0x7f800000, on);
      break;
    case FloatType::kFloat64:
      launch<int64_t, int64_t, uint64_t>(task, 0x7ff0000000000000, on);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace dcar
