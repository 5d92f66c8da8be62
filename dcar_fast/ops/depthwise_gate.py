"""Depthwise 3x3 convolution between activation and gate, on the fastest backend there is."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.kernels._layout import empty_image
from dcar_fast.ops._checks import check_no_grad, check_same_device
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._images import check_choice, check_real, in_format_of
from dcar_fast.ops._library import define
from dcar_fast.reference import depthwise_gate as reference

ACTIVATIONS = ("silu", "relu")


def depthwise_gate(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "silu", backend: str | None = None
) -> Tensor:
    """(B, C, H, W) from x (B, 2C, H, W), weight (2C, 1, 3, 3) and bias (2C,): what GLUMBConv does between its two 1x1
    convolutions.

    y = depthwise convolution of act(x) with padding 1; out = y[:, :C] * act(y[:, C:]), where ``activation`` is "silu"
    or "relu". Summed in float32 (float64 for float64) and rounded once. The result has the type of x and is contiguous
    or channels_last as x is. float32, float16, bfloat16; float64 on the reference backend only. Formula:
    ``reference/depthwise_gate.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient: inference only.
    """
    check_real("x", x, ("B", "2C", "H", "W"))
    channels = x.shape[1]
    if channels % 2 or not channels:
        raise ValueError(f"x has {channels} channels, allowed are positive even numbers")
    for name, value, shape in (("weight", weight, (channels, 1, 3, 3)), ("bias", bias, (channels,))):
        check_real(name, value, shape)
        check_same_device("x", x, name, value)
    check_choice("activation", activation, ACTIVATIONS)
    check_no_grad("depthwise_gate", x=x, weight=weight, bias=bias)
    return _depthwise_gate(x, weight, bias, activation, backend)


def _run(x: Tensor, weight: Tensor, bias: Tensor, activation: str, backend: str | None) -> Tensor:
    return choose_for("depthwise_gate", x, backend).run(x, weight, bias, activation)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, activation: str, backend: str | None) -> Tensor:
    _, doubled, height, width = x.shape
    return empty_image(x, doubled // 2, height, width)


_depthwise_gate = define(
    "depthwise_gate(Tensor x, Tensor weight, Tensor bias, str activation, str? backend) -> Tensor", _run, _fake
)


def _run_reference(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return in_format_of(x, reference.depthwise_gate(x, weight, bias, activation=activation))


def _run_triton(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    from dcar_fast.kernels.depthwise_gate import depthwise_gate as kernel  # triton is loaded on use only

    with current(x.device):
        return kernel(x, weight, bias, activation)


register(
    "depthwise_gate",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
