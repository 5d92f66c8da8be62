"""Pixel shuffle plus the duplicated shortcut, on the fastest backend there is."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.kernels._layout import empty_image
from dcar_fast.ops._checks import check_no_grad
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._images import check_like, check_real, in_format_of
from dcar_fast.ops._library import define
from dcar_fast.reference import upsample_shortcut as reference


def upsample_shortcut(y: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, C', 2H, 2W) = pixel_shuffle(y, 2) + pixel_shuffle(x with repeated channels, 2), from y (B, 4C', H, W), the
    convolution's output, and x (B, Cin, H, W), its input, where Cin divides 4C'.

    Summed in float32 and rounded once, so bit-equal on all backends. The result has the type of y and is contiguous or
    channels_last as y is. float32, float16, bfloat16; float64 on the reference backend only. Formula:
    ``reference/upsample_shortcut.py``. Without a shortcut, as in the decoder's output layer, nothing is left to fuse:
    ``torch.nn.functional.pixel_shuffle`` is one pass already.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient: inference only.
    """
    check_real("y", y, ("B", "4C'", "H", "W"))
    batch, inner, height, width = y.shape
    if inner % 4 or not inner:
        raise ValueError(f"y has {inner} channels, allowed are positive multiples of 4")
    check_real("x", x, (batch, "Cin", height, width))
    if not x.shape[1] or inner % x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels, allowed are divisors of the {inner} channels of y")
    check_like("y", y, "x", x)
    check_no_grad("upsample_shortcut", y=y, x=x)
    return _upsample_shortcut(y, x, backend)


def _run(y: Tensor, x: Tensor, backend: str | None) -> Tensor:
    return choose_for("upsample_shortcut", y, backend).run(y, x)


def _fake(y: Tensor, x: Tensor, backend: str | None) -> Tensor:
    _, inner, height, width = y.shape
    return empty_image(y, inner // 4, 2 * height, 2 * width)


_upsample_shortcut = define("upsample_shortcut(Tensor y, Tensor x, str? backend) -> Tensor", _run, _fake)


def _run_reference(y: Tensor, x: Tensor) -> Tensor:
    return in_format_of(y, reference.upsample_shortcut(y, x))


def _run_triton(y: Tensor, x: Tensor) -> Tensor:
    from dcar_fast.kernels.upsample_shortcut import upsample_shortcut as kernel  # triton is loaded on use only

    with current(y.device):
        return kernel(y, x)


register(
    "upsample_shortcut",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
