// Compiled with -mavx2 -mfma: reached only when the CPU has both.
#include "latent_noise_impl.h"

namespace dcar {

const LatentBlockKernel kLatentNoiseAvx2 = latent_block;

}  // namespace dcar
