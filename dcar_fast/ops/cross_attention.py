"""Attention of image tokens to the text, whose length differs from row to row."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.ops._checks import check_floating, check_int64, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose, everywhere, register
from dcar_fast.reference import cross_attention as reference


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T d^-0.5) v over the first ``lengths[b]`` keys of row b: (B, N, H, d) in q's dtype.

    q (B, N, H, d), k and v (B, T, H, d) of one floating dtype, lengths (B,) int64 in 0..T, all on one device. Length 0
    gives zeros. Formula: ``reference/cross_attention.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together; the
    values of ``lengths`` are looked at on the CPU only, on a GPU that would mean waiting for it.
    """
    check_tensor("q", q, ("B", "N", "H", "d"))
    check_floating("q", q)
    check_tensor("k", k, (q.shape[0], "T", *q.shape[2:]))
    check_tensor("v", v, k.shape)
    check_tensor("lengths", lengths, (q.shape[0],))
    check_int64("lengths", lengths)
    check_values("lengths", lengths, k.shape[1])
    if not q.shape[3]:
        raise ValueError(f"q has shape {tuple(q.shape)}, allowed is a head size d of at least 1")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise ValueError(f"{name} is {value.dtype}, allowed is the type of q, {q.dtype}")
    for name, value in (("k", k), ("v", v), ("lengths", lengths)):
        check_same_device("q", q, name, value)
    return choose("cross_attention", q.device, backend).run(q, k, v, lengths)


register("cross_attention", Backend("reference", reference.cross_attention, everywhere))
