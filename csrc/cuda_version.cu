#include "cuda_version.h"

#include <cuda_runtime.h>

namespace dcar {

std::pair<int, int> cuda_versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

}  // namespace dcar
