// Compiled with the compiler's baseline flags: SSE2 on x86-64, NEON on 64-bit Arm.
#include "latent_noise_impl.h"

namespace dcar {

const LatentBlockKernel kLatentNoiseGeneric = latent_block;

}  // namespace dcar
