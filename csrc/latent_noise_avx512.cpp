// Compiled with -mavx512f: reached only when the CPU has it.
#include "latent_noise_impl.h"

namespace dcar {

const LatentBlockKernel kLatentNoiseAvx512 = latent_block;

}  // namespace dcar
