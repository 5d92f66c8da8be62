"""FLOPs and kernel launches of anything built on the ops, counted on tensors without data.

    with torch.device("meta"):
        counts = count(lambda: sampler(states, mask, 0, lengths=[64]))

FLOPs follow ``torch.utils.flop_counter``: matrix products, convolutions, attention; a multiply-add is 2. Launches are
those of a GPU: what an op's Triton backend declares (``Backend.launches``), one for each operator of PyTorch that
computes something and one more for the bias of a convolution, none for views and empty tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcar_fast.ops._dispatch import launches

Shape = Sequence[int]

# operators of PyTorch that multiply no matrices, beside those that are pointwise or views
FREE = set(
    """_fused_rms_norm _native_batch_norm_legit_no_training _reshape_copy _safe_softmax _softmax _to_copy all amax any
    arange argmax argsort bucketize cat clone constant_pad_nd copy_ cumsum embedding fill_ full full_like gather index
    index_select masked_fill masked_fill_ max mean min native_batch_norm native_layer_norm new_full new_ones new_zeros
    ones ones_like pad pixel_shuffle pixel_unshuffle prod repeat repeat_interleave rsub scalar_tensor scatter
    slice_scatter softmax sort stack sum var_mean where zeros zeros_like""".split()
)
# and such that compute nothing
EMPTY = set(
    """_unsafe_view detach empty empty_like empty_strided is_same_size lift_fresh new_empty new_empty_strided
    promote_types""".split()
)


@dataclass
class Counts:
    """flops; launches, also by operator; operators without a FLOP formula, and such that declare no launches."""

    flops: int = 0
    launches: int = 0
    by_op: Counter[str] = field(default_factory=Counter)
    no_formula: set[str] = field(default_factory=set)
    undeclared: set[str] = field(default_factory=set)


def count(function: Callable[[], Any]) -> Counts:
    """Calls ``function`` once and counts what it would do on a GPU.

    The sums are only right if ``no_formula`` and ``undeclared`` are empty.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    _register()
    found = Counts()
    with FlopCounterMode(display=False) as flops, _Launches(found):
        function()
    found.flops = flops.get_total_flops()
    return found


class _Launches(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        number: int | None = 0 if func.is_view or name in EMPTY else 1
        if name == "convolution" and (*args[2:3], kwargs.get("bias"))[0] is not None:
            number = 2  # PyTorch has cuDNN run without the bias and adds it afterwards
        if namespace == "dcar_fast":
            number = launches(name, *args, **kwargs)
        if number is None:
            self.counts.undeclared.add(name)
        elif number:
            self.counts.launches += number
            self.counts.by_op[name] += number
        known = func._overloadpacket in flop_registry or torch.Tag.pointwise in func.tags
        if not (known or func.is_view or name in FREE or name in EMPTY):
            self.counts.no_formula.add(f"{namespace}::{name}")
        return func(*args, **kwargs)


def _register() -> None:
    """Formulas for our ops, where torch does not have them yet."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.dcar_fast, name)
        if packet not in flop_registry:
            register_flop_formula(packet)(formula)


# ---- formulas; torch passes shapes in the place of tensors


def _vq_lookup(z: Shape, codebook: Shape, *others: Any, **_: Any) -> int:
    return 2 * z[0] * codebook[0] * codebook[1]


def _sample_tokens(cond: Shape, uncond: Shape | None, weight: Shape, *others: Any, **_: Any) -> int:
    return 2 * cond[0] * weight[0] * weight[1]  # the head is linear: one product for both branches


def _fused_linear(x: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return 2 * x[0] * x[1] * weight[-2] * weight[-1]


def _cross_attention(q: Shape, k: Shape, *others: Any, **_: Any) -> int:
    batch, queries, heads, head = q
    return 4 * batch * queries * k[1] * heads * head


def _self_attention(qkv: Shape, *others: Any, **_: Any) -> int:
    batch, tokens, width = qkv
    return 4 * batch * tokens * tokens * (width // 3)


def _denoise_step(x: Shape, modulation: Shape, weights: Sequence[Shape], *others: Any, **_: Any) -> int:
    from dcar_fast.reference.denoise_step import HeadWeights

    head, rows = HeadWeights(*weights), modulation[0]
    width, channels = head.input_weight
    depth = head.hidden_weight[0]
    fed = x[0] if x[0] < rows else rows  # under guidance both branches are fed the same
    return 2 * fed * channels * width + 4 * rows * depth * width * width + 4 * rows * width * channels


def _relu_linear_attention(qkv: Shape, *others: Any, **_: Any) -> int:
    batch, width, height, columns = qkv
    pixels, heads, dim = height * columns, batch * (width // 96), 32
    if pixels > dim:
        return 4 * heads * (dim + 1) * pixels * dim
    return 4 * heads * pixels * dim * pixels


def _depthwise_gate(x: Shape, *others: Any, **_: Any) -> int:
    batch, channels, height, width = x
    return 18 * batch * channels * height * width


def _nothing(*arguments: Any, **_: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "add_residual": _nothing,
    "bias_residual": _nothing,
    "channel_norm": _nothing,
    "cross_attention": _cross_attention,
    "denoise_step": _denoise_step,
    "depthwise_gate": _depthwise_gate,
    "embed_tokens": _nothing,
    "fused_linear": _fused_linear,
    "gelu": _nothing,
    "latent_noise": _nothing,
    "place_tokens": _nothing,
    "quantize_rows": _nothing,
    "relu_linear_attention": _relu_linear_attention,
    "remask": _nothing,
    "sample_from_logits": _nothing,
    "sample_tokens": _sample_tokens,
    "self_attention": _self_attention,
    "upsample_shortcut": _nothing,
    "vq_lookup": _vq_lookup,
}
