"""Attention of image tokens to the text, whose length differs from row to row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcar_fast.ops._attention import check_type
from dcar_fast.ops._checks import check_int64, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import cross_attention as reference


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T d^-0.5) v over the first ``lengths[b]`` keys of row b: (B, N, H, d) in q's dtype, contiguous.

    q (B, N, H, d), k and v (B, T, H, d) of one type out of float32, float16, bfloat16 and float64 (which only the
    reference runs), lengths (B,) int64 in 0..T, all on one device, with any strides. Length 0 gives zeros; keys beyond
    the length may hold anything, NaN too. Softmax and sums are float32, one rounding at the end (and, in the kernels,
    of the softmax weights to the type of v). Formula: ``reference/cross_attention.py``.

    Differentiable in q, k and v: the backward keeps the inputs alone and computes the weights again in PyTorch, in
    float32, on every backend. It holds four (B, H, N, T) float32 matrices at a time, 16 B H N T bytes. Ignored keys
    and values get gradients of exactly zero.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together. The
    values of ``lengths`` are looked at on the CPU only, on a GPU that would mean waiting for it: there, kernels take
    lengths outside 0..T as 0 or T.
    """
    check_tensor("q", q, ("B", "N", "H", "d"))
    check_type("q", q)
    check_tensor("k", k, (q.shape[0], "T", *q.shape[2:]))
    check_tensor("v", v, k.shape)
    check_tensor("lengths", lengths, (q.shape[0],))
    check_int64("lengths", lengths)
    if not q.shape[3]:
        raise ValueError(f"q has shape {tuple(q.shape)}, allowed is a head size d of at least 1")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise ValueError(f"{name} is {value.dtype}, allowed is the type of q, {q.dtype}")
    for name, value in (("k", k), ("v", v), ("lengths", lengths)):
        check_same_device("q", q, name, value)
    return _cross_attention(q, k, v, lengths, backend)


def _run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, backend: str | None) -> Tensor:
    check_values("lengths", lengths, k.shape[1])
    return choose_for("cross_attention", q, backend).run(q, k, v, lengths)


def _fake(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, backend: str | None) -> Tensor:
    return q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *reference.cross_attention_backward(grad, *ctx.saved_tensors), None, None


_cross_attention = define(
    "cross_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, str? backend) -> Tensor",
    _run,
    _fake,
    backward=_backward,
    setup_context=_keep,
)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return reference.cross_attention(q, k, v, lengths).contiguous()


def _run_triton(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    from dcar_fast.kernels.cross_attention import cross_attention as kernel  # triton is loaded on use only

    with current(q.device):
        return kernel(q, k, v, lengths)


register(
    "cross_attention",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
