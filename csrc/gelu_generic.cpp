// Compiled with the compiler's baseline flags: SSE2 on x86-64, NEON on 64-bit Arm.
#include "gelu_impl.h"

namespace dcar {

const GeluLoop kGeluGeneric = make_gelu_loop();

}  // namespace dcar
