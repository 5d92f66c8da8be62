// Which instruction set the CPU kernels run with, decided once at run time.
#pragma once

#include <string>
#include <vector>

namespace dcar {

// Instruction sets this CPU and operating system can run, best first; "generic" is always the last.
// The names are "avx512", "avx2" (with FMA) and "generic" (128-bit vectors of the compiler's baseline).
const std::vector<std::string>& usable_isas();

// Whether 8-bit integer products can run in AVX-512 (VNNI), for kernels that use them.
bool has_avx512vnni();

}  // namespace dcar
