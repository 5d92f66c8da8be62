"""Operations with several implementations behind one function each; ``_dispatch`` chooses and says why."""

from dcar_fast.noise import ConfidenceNoise, LatentNoise, TokenNoise
from dcar_fast.ops._dispatch import report
from dcar_fast.ops._head import embed_condition, embed_timesteps, modulations, pack_head, step_coefficients
from dcar_fast.ops.add_residual import add_residual
from dcar_fast.ops.bias_residual import bias_residual
from dcar_fast.ops.channel_norm import channel_norm
from dcar_fast.ops.cross_attention import cross_attention
from dcar_fast.ops.denoise_step import denoise_step
from dcar_fast.ops.depthwise_gate import depthwise_gate
from dcar_fast.ops.embed_tokens import embed_tokens
from dcar_fast.ops.fused_linear import fused_linear
from dcar_fast.ops.gelu import gelu
from dcar_fast.ops.latent_noise import latent_noise
from dcar_fast.ops.place_tokens import place_tokens
from dcar_fast.ops.quantize_rows import quantize_rows
from dcar_fast.ops.relu_linear_attention import relu_linear_attention
from dcar_fast.ops.remask import remask
from dcar_fast.ops.sample_from_logits import sample_from_logits
from dcar_fast.ops.sample_tokens import sample_tokens
from dcar_fast.ops.self_attention import self_attention
from dcar_fast.ops.upsample_shortcut import upsample_shortcut
from dcar_fast.ops.vq_lookup import vq_lookup

__all__ = [
    "ConfidenceNoise",
    "LatentNoise",
    "TokenNoise",
    "add_residual",
    "bias_residual",
    "channel_norm",
    "cross_attention",
    "denoise_step",
    "depthwise_gate",
    "embed_condition",
    "embed_timesteps",
    "embed_tokens",
    "fused_linear",
    "gelu",
    "latent_noise",
    "modulations",
    "pack_head",
    "place_tokens",
    "quantize_rows",
    "relu_linear_attention",
    "remask",
    "report",
    "sample_from_logits",
    "sample_tokens",
    "step_coefficients",
    "self_attention",
    "upsample_shortcut",
    "vq_lookup",
]
