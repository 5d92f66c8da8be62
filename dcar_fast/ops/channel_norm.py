"""LayerNorm or RMSNorm over the channels of each pixel, with activation and residual, on the fastest backend."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.kernels._layout import empty_image
from dcar_fast.ops._checks import check_no_grad, check_number, check_same_device
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._images import check_choice, check_like, check_real, in_format_of
from dcar_fast.ops._library import define
from dcar_fast.reference import channel_norm as reference

ACTIVATIONS = ("none", "relu", "silu")


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    centred: bool = True,
    backend: str | None = None,
) -> Tensor:
    """residual + act(norm(x)) with x and residual (B, C, H, W), weight and bias (C,) -> (B, C, H, W).

    The norm, LayerNorm or (not ``centred``) RMSNorm, runs over the C channels of each pixel, with float32 statistics
    (float64 for float64); ``activation`` is "none", "relu" or "silu". The result has the type of x and is contiguous or
    channels_last as x is. float32, float16, bfloat16; float64 on the reference backend only. Formula:
    ``reference/channel_norm.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient: inference only.
    """
    check_real("x", x, ("B", "C", "H", "W"))
    if not x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, allowed is (B, C, H, W) with C at least 1")
    for name, value in (("weight", weight), ("bias", bias)):
        check_real(name, value, (x.shape[1],))
        check_same_device("x", x, name, value)
    if residual is not None:
        check_real("residual", residual, x.shape)
        check_like("x", x, "residual", residual)
    check_choice("activation", activation, ACTIVATIONS)
    check_number("eps", eps, 0.0)
    if not isinstance(centred, bool):
        raise ValueError(f"centred is {centred!r}, allowed are True and False")
    check_no_grad("channel_norm", x=x, weight=weight, bias=bias, residual=residual)
    return _channel_norm(x, weight, bias, residual, activation, eps, centred, backend)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    eps: float,
    centred: bool,
    backend: str | None,
) -> Tensor:
    return choose_for("channel_norm", x, backend).run(x, weight, bias, residual, activation, eps, centred)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    eps: float,
    centred: bool,
    backend: str | None,
) -> Tensor:
    return empty_image(x, *x.shape[1:])


_channel_norm = define(
    "channel_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, str activation, float eps, bool centred, "
    "str? backend) -> Tensor",
    _run,
    _fake,
)


def _run_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float, centred: bool
) -> Tensor:
    settings = {"residual": residual, "activation": activation, "eps": eps, "centred": centred}
    out = reference.channel_norm(x, weight, bias, **settings)
    return in_format_of(x, out)


def _run_triton(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float, centred: bool
) -> Tensor:
    from dcar_fast.kernels.channel_norm import channel_norm as kernel  # triton is loaded on use only

    with current(x.device):
        return kernel(x, weight, bias, residual, activation, eps, centred)


register(
    "channel_norm",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
