#include "add_residual.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dcar {
namespace {

// A block owns kTile tokens of one image and walks over the channels in steps of kTile. Reads run along channels,
// writes along tokens, and the tile in shared memory turns one into the other, so both are coalesced.
constexpr int kTile = 32;
constexpr int kWarps = 8;

template <class Out>
__device__ Out convert(float x);
template <>
__device__ float convert<float>(float x) {
  return x;
}
template <>
__device__ __half convert<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 convert<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class Out>
__global__ void __launch_bounds__(32 * kWarps)
    add_residual_kernel(const int64_t* __restrict__ ids, const float* __restrict__ codebook,
                        const float* __restrict__ residual, Out* __restrict__ out, int64_t tokens, int64_t tiles,
                        int64_t num_codes, int64_t channels) {
  __shared__ float tile[kTile][kTile + 1];  // one column more: a column is then read from 32 different banks
  __shared__ float norm[kTile];

  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int64_t image = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;

  for (int t = warp; t < kTile && first + t < tokens; t += kWarps) {
    const int64_t id = ids[image * tokens + first + t];
    float sum = 0.0f;
    if (id >= 0 && id < num_codes)
      for (int64_t c = lane; c < channels; c += 32) {
        const float x = codebook[id * channels + c];
        sum += x * x;
      }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const float length = sqrtf(sum);
    if (lane == 0) norm[t] = length < 1e-12f ? 1e-12f : length;
  }
  // norm[t] is read below by the warp that wrote it.
  __syncwarp();

  for (int64_t begin = 0; begin < channels; begin += kTile) {
    const int64_t c = begin + lane;
    for (int t = warp; t < kTile && first + t < tokens; t += kWarps) {
      const int64_t token = image * tokens + first + t;
      const int64_t id = ids[token];
      float value = __int_as_float(0x7fffffff);  // NaN marks an id that is not in the codebook
      if (c < channels && id >= 0 && id < num_codes) {
        value = codebook[id * channels + c] / norm[t];
        if (residual != nullptr) value += residual[token * channels + c];
      }
      tile[t][lane] = value;
    }
    __syncthreads();
    if (first + lane < tokens)
      for (int row = warp; row < kTile && begin + row < channels; row += kWarps)
        out[(image * channels + begin + row) * tokens + first + lane] = convert<Out>(tile[lane][row]);
    __syncthreads();
  }
}

template <class Out>
void launch(const int64_t* ids, const float* codebook, const float* residual, void* out, int64_t batch, int64_t tokens,
            int64_t num_codes, int64_t channels, cudaStream_t stream) {
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  add_residual_kernel<Out><<<static_cast<unsigned>(batch * tiles), dim3(32, kWarps), 0, stream>>>(
      ids, codebook, residual, static_cast<Out*>(out), tokens, tiles, num_codes, channels);
}

}  // namespace

std::string add_residual_cuda(const int64_t* ids, const float* codebook, const float* residual, void* out,
                              int64_t batch, int64_t tokens, int64_t num_codes, int64_t channels, OutputType type,
                              void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (type) {
    case OutputType::kFloat32:
      launch<float>(ids, codebook, residual, out, batch, tokens, num_codes, channels, on);
      break;
    case OutputType::kFloat16:
      launch<__half>(ids, codebook, residual, out, batch, tokens, num_codes, channels, on);
      break;
    case OutputType::kBFloat16:
      launch<__nv_bfloat16>(ids, codebook, residual, out, batch, tokens, num_codes, channels, on);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace dcar
