"""Images for the tests of the decoder's ops: every way in which one can lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "channels_last slice", "channel slice", "cutout", "transposed", "every other"]


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uniforms(low: float, high: float, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers whose sums and products stay alike in size: the largest error is then one of many, not one of few."""
    return (low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies around a slice is NaN."""
    batch, channels, height, width = x.shape

    def inside(*larger: int) -> Tensor:
        return torch.full(larger, float("nan"), dtype=x.dtype, device=x.device)

    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last slice":
        out = inside(batch, height, width, channels + 3).permute(0, 3, 1, 2)[:, 2 : 2 + channels]
    elif layout == "channel slice":
        out = inside(batch, channels + 3, height, width)[:, 1 : 1 + channels]
    elif layout == "cutout":
        out = inside(batch, channels, height + 2, width + 3)[:, :, 1:-1, 2:-1]
    elif layout == "transposed":
        out = inside(batch, channels, width, height).transpose(2, 3)
    else:
        assert layout == "every other"
        out = inside(batch, channels, height, 2 * width)[..., ::2]
    return out.copy_(x)


def check_format(got: Tensor, layout: str) -> None:
    """The result is dense, and channels_last where the input's channels lie side by side."""
    last = layout.startswith("channels_last")
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
