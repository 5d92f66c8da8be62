// The tanh-approximated GELU on the CPU. The formula is dcar_fast/reference/gelu.py's.
#pragma once

#include <cstdint>
#include <string>

#include "float_type.h"

namespace dcar {

// out[i] = gelu(x[i]) for `count` numbers, float32 or bfloat16; out may be x. `isa`: one of usable_isas().
void gelu(const void* x, void* out, int64_t count, FloatType type, int num_threads, const std::string& isa);

}  // namespace dcar
