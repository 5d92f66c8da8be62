// Compiled with -mavx2 -mfma: reached only when the CPU has both.
#include "gelu_impl.h"

namespace dcar {

const GeluLoop kGeluAvx2 = make_gelu_loop();

}  // namespace dcar
