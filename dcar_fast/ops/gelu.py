"""The tanh-approximated GELU; on a CPU in one pass at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._checks import check_floating, check_no_grad
from dcar_fast.ops._dispatch import Backend, choose_for, everywhere, register
from dcar_fast.ops._library import define
from dcar_fast.reference import gelu as reference


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), of any shape and strides, in x's floating type. Contiguous.

    Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what is no
    floating-point tensor and for an input that asks for a gradient, because there is none.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}, allowed is a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"x is {x.layout}, allowed is torch.strided: use to_dense()")
    check_floating("x", x)
    check_no_grad("gelu", x=x)
    return _gelu(x, backend)


def _run(x: Tensor, backend: str | None) -> Tensor:
    return choose_for("gelu", x, backend).run(x)


def _fake(x: Tensor, backend: str | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gelu = define("gelu(Tensor x, str? backend) -> Tensor", _run, _fake)


register("gelu", Backend("reference", reference.gelu, everywhere))
