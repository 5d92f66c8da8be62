// The words of the sampling noise as a kernel of their own: proof that csrc/philox.h gives on a GPU what it gives on
// the host. Kernels that draw include the header.
#include <string>

#include "philox_words.h"

#include <cuda_runtime.h>

#include "philox.h"

namespace dcar {
namespace {

__global__ void philox_kernel(const uint32_t* counters, const uint32_t* keys, uint32_t* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t* c = counters + 4 * i;
  const PhiloxWords drawn = philox4x32({{c[0], c[1], c[2], c[3]}}, keys[2 * i], keys[2 * i + 1]);
  for (int w = 0; w < 4; ++w) words[4 * i + w] = drawn.word[w];
}

}  // namespace

std::string philox_words_cuda(const uint32_t* counters, const uint32_t* keys, uint32_t* words, int64_t count,
                              void* stream) {
  constexpr int kThreads = 128;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  philox_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(counters, keys, words, count);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace dcar
