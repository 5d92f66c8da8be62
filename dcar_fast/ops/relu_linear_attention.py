"""ReLU linear attention, on the fastest backend there is."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.kernels._layout import empty_image
from dcar_fast.ops._checks import check_no_grad
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._images import check_real, in_format_of
from dcar_fast.ops._library import define
from dcar_fast.reference import relu_linear_attention as reference

GROUP = 3 * reference.HEAD_DIM


def relu_linear_attention(qkv: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, C, H, W) from qkv (B, 3C, H, W), heads of 32 channels: channels [96j, 96j + 96) are q, k, v of head j.

    out = sum over keys of relu(q) . relu(k) v / (sum over keys of relu(q) . relu(k) + 1e-15). Up to 32 pixels the
    products of q and k come first, beyond that those of k and v. The result has the type of qkv and is contiguous or
    channels_last as qkv is. float32, float16, bfloat16; float64 on the reference backend only. Formula:
    ``reference/relu_linear_attention.py``.

    The reference keeps to the released model: in bfloat16 its sums are rounded to bfloat16 before the division. The
    Triton kernels keep every sum in float32 whatever the type, which is more exact.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient: inference only.
    """
    check_real("qkv", qkv, ("B", "3C", "H", "W"))
    if qkv.shape[1] % GROUP or not qkv.shape[1]:
        raise ValueError(f"qkv has {qkv.shape[1]} channels, allowed are positive multiples of {GROUP}")
    check_no_grad("relu_linear_attention", qkv=qkv)
    return _relu_linear_attention(qkv, backend)


def _run(qkv: Tensor, backend: str | None) -> Tensor:
    return choose_for("relu_linear_attention", qkv, backend).run(qkv)


def _fake(qkv: Tensor, backend: str | None) -> Tensor:
    _, inner, height, width = qkv.shape
    return empty_image(qkv, inner // 3, height, width)


_relu_linear_attention = define("relu_linear_attention(Tensor qkv, str? backend) -> Tensor", _run, _fake)


def _run_reference(qkv: Tensor) -> Tensor:
    return in_format_of(qkv, reference.relu_linear_attention(qkv))


def _run_triton(qkv: Tensor) -> Tensor:
    from dcar_fast.kernels.relu_linear_attention import relu_linear_attention as kernel  # triton is loaded on use only

    with current(qkv.device):
        return kernel(qkv)


# two launches, one of them spared up to 32 pixels
register(
    "relu_linear_attention",
    Backend("triton", _run_triton, triton_usable, launches=2),
    Backend("reference", _run_reference, everywhere),
)
