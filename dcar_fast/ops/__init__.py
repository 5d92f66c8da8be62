"""Operations with several implementations behind one function each; ``_dispatch`` chooses and says why."""

from dcar_fast.noise import TokenNoise
from dcar_fast.ops._dispatch import report
from dcar_fast.ops.add_residual import add_residual
from dcar_fast.ops.cross_attention import cross_attention
from dcar_fast.ops.remask import remask
from dcar_fast.ops.sample_from_logits import sample_from_logits
from dcar_fast.ops.sample_tokens import sample_tokens
from dcar_fast.ops.vq_lookup import vq_lookup

__all__ = [
    "TokenNoise",
    "add_residual",
    "cross_attention",
    "remask",
    "report",
    "sample_from_logits",
    "sample_tokens",
    "vq_lookup",
]
