"""The tanh-approximated GELU; on a CPU in one pass at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_floating, check_no_grad
from dcar_fast.ops._dispatch import Backend, choose_for, everywhere, register
from dcar_fast.ops._library import define
from dcar_fast.reference import gelu as reference

NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), of any shape and strides, in x's floating type. Contiguous.

    Inference only. ``backend``: see ``_dispatch.choose``; "native" has float32 and bfloat16, other types take the
    reference. On a GPU the reference is PyTorch's kernel: there it belongs into the product before it. Raises
    ValueError, before any work, for what is no floating-point tensor and for an input that asks for a gradient, because
    there is none.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}, allowed is a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"x is {x.layout}, allowed is torch.strided: use to_dense()")
    check_floating("x", x)
    check_no_grad("gelu", x=x)
    return _gelu(x, backend)


def _run(x: Tensor, backend: str | None) -> Tensor:
    without = () if x.dtype in NATIVE else (x.dtype,)
    return choose_for("gelu", x, backend, without).run(x)


def _fake(x: Tensor, backend: str | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gelu = define("gelu(Tensor x, str? backend) -> Tensor", _run, _fake)


def _run_native(x: Tensor) -> Tensor:
    x = _native.aligned(x.contiguous())
    out = torch.empty_like(x)
    _native.module().gelu(
        x=x.data_ptr(),
        out=out.data_ptr(),
        count=x.numel(),
        dtype=NATIVE[x.dtype],
        num_threads=torch.get_num_threads(),
    )
    return out


register(
    "gelu",
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", reference.gelu, everywhere),
)
