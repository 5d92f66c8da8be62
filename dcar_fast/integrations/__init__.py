"""Other people's samplers, faster: what someone imports to speed their own codebase up without touching its models.

patch_diffloss(obj), explain(obj): the diffusion heads of the MAR family (MAR, HART, MaskGen, DC-AR).
accelerate(generator): the released DC-AR generator, on FastSampler.
accelerate_autoencoder(module): DC-AE decoders, efficientvit's and diffusers'.
unpatch(obj): takes back what the first and the last did.
"""

from dcar_fast.integrations.autoencoder import DecoderPatch, accelerate_autoencoder
from dcar_fast.integrations.dcar import AcceleratedGenerator, accelerate
from dcar_fast.integrations.diffloss import Patch, explain, patch_diffloss
from dcar_fast.integrations.unpatch import unpatch

__all__ = [
    "AcceleratedGenerator",
    "DecoderPatch",
    "Patch",
    "accelerate",
    "accelerate_autoencoder",
    "explain",
    "patch_diffloss",
    "unpatch",
]
