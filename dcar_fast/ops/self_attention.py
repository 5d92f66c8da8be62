"""Self-attention with normalised queries and keys, from the output of the qkv projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcar_fast.ops._attention import KERNEL_TYPES, check_type
from dcar_fast.ops._checks import check_floating, check_moments, check_number, check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import self_attention as reference
from dcar_fast.reference._moments import PIECE


def self_attention(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(LN(q) LN(k)^T (D / heads)^-0.5) v per head, for [q | k | v] = qkv: (B, N, D) in qkv's dtype, contiguous.

    qkv (B, N, 3D) of float32, float16, bfloat16 or float64 (which only the reference runs), D a multiple of ``heads``;
    weights and biases (D,), of any floating type, of LayerNorms over all D, before the split into heads; ``eps``
    is added to the variance. All on one device, with any strides. Statistics, softmax and sums are float32. Formula:
    ``reference/self_attention.py``.

    ``moments`` (B, N, 3D / 64, 2) float32 (float64 with float64): the row moments of qkv that
    ``fused_linear(..., emit_moments=True)`` gives with it, where D is a multiple of 64. They spare the kernels a launch
    that reads q and k for their statistics: 1 launch instead of 2.

    ``k_bias`` adds the same to all scores of a query, so it changes nothing: the kernels do not read it, and its
    gradient is zero up to rounding. In float16 and bfloat16 they subtract the mean of a key after the product with the
    query, whose float32 rounding shows where a key row's mean is thousands of times its deviation.

    Differentiable in all tensors but moments: the backward keeps the inputs alone and computes statistics and weights
    again in PyTorch, in float32, on every backend. It holds four (B, heads, N, N) float32 matrices at a time, which is
    16 B heads N^2 bytes.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together.
    """
    check_tensor("qkv", qkv, ("B", "N", "3D"))
    check_type("qkv", qkv)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads is {heads!r}, allowed are integers of at least 1")
    if not qkv.shape[2] or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, allowed is (B, N, 3D) with D a multiple of heads, {heads}")
    check_number("eps", eps, 0.0)
    norms = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    for name, value in norms.items():
        check_tensor(name, value, (qkv.shape[2] // 3,))
        check_floating(name, value)
        check_same_device("qkv", qkv, name, value)
    if moments is not None:
        _check_moments(moments, qkv)
    return _self_attention(qkv, q_weight, q_bias, k_weight, k_bias, heads, eps, moments, backend)


def _check_moments(moments: Tensor, qkv: Tensor) -> None:
    width = qkv.shape[2] // 3
    if width % PIECE:
        raise ValueError(f"moments is given, allowed is None unless D, {width}, is a multiple of {PIECE}")
    check_moments("moments", "qkv", moments, qkv, 3 * width // PIECE)


def _run(qkv: Tensor, *arguments: Any) -> Tensor:
    *arguments, backend = arguments
    return choose_for("self_attention", qkv, backend).run(qkv, *arguments)


def _fake(qkv: Tensor, *arguments: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.heads, ctx.eps = inputs[5:7]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = reference.self_attention_backward(grad, *ctx.saved_tensors, heads=ctx.heads, eps=ctx.eps)
    return *found, None, None, None, None


_self_attention = define(
    "self_attention(Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, int heads, float eps,"
    " Tensor? moments, str? backend) -> Tensor",
    _run,
    _fake,
    backward=_backward,
    setup_context=_keep,
)


def _run_reference(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    heads: int,
    eps: float,
    moments: Tensor | None,
) -> Tensor:
    norms = (q_weight, q_bias, k_weight, k_bias)
    return reference.self_attention(qkv, *norms, heads=heads, eps=eps, moments=moments).contiguous()


def _run_triton(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    heads: int,
    eps: float,
    moments: Tensor | None,
) -> Tensor:
    from dcar_fast.kernels.self_attention import self_attention as kernel  # triton is loaded on use only

    weights = (w if w.dtype in KERNEL_TYPES else w.float() for w in (q_weight, q_bias, k_weight))
    with current(qkv.device):
        return kernel(qkv, *weights, heads, eps, moments)


def _launches(*arguments: Any) -> int:
    *_, moments, _ = arguments
    return 2 if moments is None else 1


register(
    "self_attention",
    Backend("triton", _run_triton, triton_usable, launches=_launches),
    Backend("reference", _run_reference, everywhere),
)
