"""3x3 convolutions with 2.25 times fewer multiplications, for CPUs in float32.

Winograd's F(2 x 2, 3 x 3) after Lavin and Gray (2016): 4 x 4 pixels and the kernel are transformed by additions, the
products over channels become 16 matrix products, and each result is transformed into 2 x 2 pixels. In float32 it rounds
about as much as a direct convolution, since its sums are nine times shorter; larger tiles need fewer multiplications
still and lose digits, as this one does in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILES = 256  # transformed at a time: enough rows for a matrix product, few enough to stay in the cache

_KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def transformed(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (16, I, O) of the same type, computed in float64."""
    kernel = torch.tensor(_KERNEL, dtype=torch.float64, device=weight.device)
    out = torch.einsum("ak,oikl,bl->abio", kernel, weight.double(), kernel)
    return out.reshape(16, *out.shape[2:]).to(weight.dtype).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, add: Tensor | None = None) -> Tensor:
    """(B, O, H, W) = relu(conv(x) + bias) + add, channels last, from x (B, I, H, W) and :func:`transformed` weights."""
    outputs = weight.shape[2]
    batch, _, height, width = x.shape
    down, across = (height + 1) // 2, (width + 1) // 2  # tiles
    y = x.new_empty(batch, 2 * down, 2 * across, outputs)
    image = x.permute(0, 2, 3, 1)
    work = _Buffers(x, weight)
    for images, rows in _blocks(batch, down, across):
        part = y[images, 2 * rows.start : 2 * rows.stop]
        _to_pixels(_products(_strip(image[images], rows), weight, across, work), bias, part, work)
        if relu:
            part.relu_()
    y = y[:, :height, :width].permute(0, 3, 1, 2)
    y = y.contiguous(memory_format=torch.channels_last)  # already so unless a side is odd
    return y if add is None else y.add_(add)


class _Buffers:
    """Memory that every block uses again, and so finds in the cache."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._like, self._held = x, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != shape:
            held = self._held[name] = self._like.new_empty(shape)
        return held


def _blocks(batch: int, down: int, across: int) -> Iterator[tuple[slice, slice]]:
    """(images, rows of tiles) with about TILES tiles each: several images, or a part of one."""
    images = max(1, TILES // (down * across))
    rows = down if images > 1 else min(down, max(1, TILES // across))
    for first in range(0, batch, images):
        for top in range(0, down, rows):
            yield slice(first, min(first + images, batch)), slice(top, min(top + rows, down))


def _strip(image: Tensor, rows: slice) -> Tensor:
    """The pixels (n, 2 rows + 2, W, I) that rows of tiles look at; zeros above and below the image."""
    top, bottom = 2 * rows.start - 1, 2 * rows.stop + 1
    inside = image[:, max(top, 0) : min(bottom, image.shape[1])]
    above, below = max(-top, 0), max(bottom - image.shape[1], 0)
    return F.pad(inside, (0, 0, 0, 0, above, below)) if above or below else inside


def _products(strip: Tensor, weight: Tensor, across: int, work: _Buffers) -> Tensor:
    """(n, 2r + 2, W, I) -> (4, 4, n, r, across, O)."""
    n, height, width, inputs = strip.shape
    r = height // 2 - 1
    d = [strip[:, i : i + 2 * r - 1 : 2] for i in range(4)]  # each (n, r, W, I)
    t = work("rows", 4, n, r, 2 * across + 2, inputs)
    t[..., 0, :] = 0
    t[..., width + 1 :, :] = 0
    inner = t[..., 1 : width + 1, :]
    _four(d, inner, dim=0)
    v = work("tiles", 4, 4, n, r, across, inputs)
    _four([t[..., j : j + 2 * across - 1 : 2, :] for j in range(4)], v, dim=1)
    m = work("products", 16, n * r * across, weight.shape[2])
    torch.bmm(v.view(16, -1, inputs), weight, out=m)
    return m.view(4, 4, n, r, across, -1)


def _four(d: list[Tensor], out: Tensor, dim: int) -> None:
    """The input transform along one axis: d0 - d2, d1 + d2, d2 - d1, d1 - d3."""
    first, second, third, fourth = out.unbind(dim)
    torch.sub(d[0], d[2], out=first)
    torch.add(d[1], d[2], out=second)
    torch.sub(d[2], d[1], out=third)
    torch.sub(d[1], d[3], out=fourth)


def _to_pixels(m: Tensor, bias: Tensor | None, out: Tensor, work: _Buffers) -> None:
    """The output transform: m0 + m1 + m2 and m1 - m2 - m3, along rows, then along columns into (n, 2r, 2 across, O)."""
    if bias is not None:
        m[1, 1].add_(bias)  # a part of every pixel, once
    s = work("sums", 2, *m.shape[1:])  # (2, 4, n, r, across, O)
    _two(m, s[0], s[1])
    n, r, across, outputs = m.shape[2:]
    pixels = out.view(n, r, 2, across, 2, outputs).permute(4, 2, 0, 1, 3, 5)  # column, row of the tile, n, r, across, O
    _two(s.unbind(1), pixels[0], pixels[1])


def _two(m, first: Tensor, second: Tensor) -> None:
    torch.add(m[1], m[2], out=first)
    first.add_(m[0])
    torch.sub(m[1], m[2], out=second)
    second.sub_(m[3])
