// The inner loops of gelu, one pair per instruction set. Kept apart from gelu.h so that the files compiled for one
// instruction set include nothing else.
#pragma once

#include <cstdint>

namespace dcar {

struct GeluLoop {
  void (*float32)(const float* x, float* out, int64_t count);
  void (*bfloat16)(const uint16_t* x, uint16_t* out, int64_t count);
};

extern const GeluLoop kGeluGeneric;
#ifdef DCAR_FAST_X86
extern const GeluLoop kGeluAvx2;
extern const GeluLoop kGeluAvx512;
#endif

}  // namespace dcar
