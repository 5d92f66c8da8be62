// Compiled with -mavx512f: reached only when the CPU has it.
#include "gelu_impl.h"

namespace dcar {

const GeluLoop kGeluAvx512 = make_gelu_loop();

}  // namespace dcar
