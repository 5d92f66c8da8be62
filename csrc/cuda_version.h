// Which CUDA the kernels were built with, and which one the driver here can run.
#pragma once

#include <utility>

namespace dcar {

// {version of the runtime linked in, newest version that the driver supports}, as 1000 * major + 10 * minor; the second
// is 0 where there is no driver.
std::pair<int, int> cuda_versions();

}  // namespace dcar
