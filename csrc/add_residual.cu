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

// Element i. The type is the same for all threads, so asking for it costs next to nothing beside the access.
__device__ float load(const void* data, FloatType type, int64_t i) {
  if (type == FloatType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == FloatType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

template <class Out>
__global__ void __launch_bounds__(32 * kWarps) add_residual_kernel(AddResidual task, int64_t tiles) {
  __shared__ float tile[kTile][kTile + 1];  // one column more: a column is then read from 32 different banks
  __shared__ float norm[kTile];

  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int64_t tokens = task.tokens, channels = task.channels;
  const int64_t image = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;

  for (int t = warp; t < kTile && first + t < tokens; t += kWarps) {
    const int64_t id = task.ids[image * tokens + first + t];
    float sum = 0.0f;
    if (id >= 0 && id < task.num_codes)
      for (int64_t c = lane; c < channels; c += 32) {
        const float x = load(task.codebook, task.codebook_type, id * channels + c);
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
      const int64_t token = first + t;
      const int64_t id = task.ids[image * tokens + token];
      float value = __int_as_float(0x7fffffff);  // NaN marks an id that is not in the codebook
      if (c < channels && id >= 0 && id < task.num_codes) {
        value = load(task.codebook, task.codebook_type, id * channels + c) / norm[t];
        if (task.residual != nullptr)
          value += load(task.residual, task.residual_type,
                        image * task.residual_image + token * task.residual_token + c * task.residual_channel);
      }
      tile[t][lane] = value;
    }
    __syncthreads();
    Out* out = static_cast<Out*>(task.out);
    if (first + lane < tokens)
      for (int row = warp; row < kTile && begin + row < channels; row += kWarps)
        out[(image * channels + begin + row) * tokens + first + lane] = convert<Out>(tile[lane][row]);
    __syncthreads();
  }
}

template <class Out>
void launch(const AddResidual& task, cudaStream_t stream) {
  const int64_t tiles = (task.tokens + kTile - 1) / kTile;
  add_residual_kernel<Out><<<static_cast<unsigned>(task.batch * tiles), dim3(32, kWarps), 0, stream>>>(task, tiles);
}

}  // namespace

std::string add_residual_cuda(const AddResidual& task, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (task.out_type) {
    case FloatType::kFloat16:
      launch<__half>(task, on);
      break;
    case FloatType::kBFloat16:
      launch<__nv_bfloat16>(task, on);
      break;
    default:
      launch<float>(task, on);
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace dcar
