"""Bias, activation and residual behind a convolution in one pass, on the fastest backend there is."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.kernels._layout import empty_image
from dcar_fast.ops._checks import check_no_grad, check_same_device
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._images import check_choice, check_like, check_real, in_format_of
from dcar_fast.ops._library import define
from dcar_fast.reference import bias_residual as reference

ACTIVATIONS = ("none", "relu", "silu")


def bias_residual(
    x: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """residual + act(x + bias) with x and residual (B, C, H, W), bias (C,) -> (B, C, H, W).

    For a convolution that runs without its bias: ``activation`` is "none", "relu" or "silu". Summed in float32 (float64
    for float64) and rounded once, so bit-equal on all backends but for silu. The result has the type of x and is
    contiguous or channels_last as x is. float32, float16, bfloat16; float64 on the reference backend only. Formula:
    ``reference/bias_residual.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient: inference only.
    """
    check_real("x", x, ("B", "C", "H", "W"))
    check_real("bias", bias, (x.shape[1],))
    check_same_device("x", x, "bias", bias)
    if residual is not None:
        check_real("residual", residual, x.shape)
        check_like("x", x, "residual", residual)
    check_choice("activation", activation, ACTIVATIONS)
    check_no_grad("bias_residual", x=x, bias=bias, residual=residual)
    return _bias_residual(x, bias, residual, activation, backend)


def _run(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, backend: str | None) -> Tensor:
    return choose_for("bias_residual", x, backend).run(x, bias, residual, activation)


def _fake(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, backend: str | None) -> Tensor:
    return empty_image(x, *x.shape[1:])


_bias_residual = define(
    "bias_residual(Tensor x, Tensor bias, Tensor? residual, str activation, str? backend) -> Tensor", _run, _fake
)


def _run_reference(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return in_format_of(x, reference.bias_residual(x, bias, residual=residual, activation=activation))


def _run_triton(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    from dcar_fast.kernels.bias_residual import bias_residual as kernel  # triton is loaded on use only

    with current(x.device):
        return kernel(x, bias, residual, activation)


register(
    "bias_residual",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
