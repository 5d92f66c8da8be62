"""Decoding an image in tiles, so that little of it is in memory at a time.

Layers without attention look at a few pixels around their own. A tile that starts from as many more as all of its
layers look at, and is cut down behind each of them, gives the very pixels of the whole image; at the image's edge it
ends where the image does, so that the zeros of the padding are the same ones. Layers with attention run on the whole
image: they sit where it is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """(B, C, H, W) -> (B, outputs, scale H, scale W), each pixel from those up to ``reach`` away; None: from all.

    For each pixel of the input ``elements`` numbers are in memory at most, roughly, ``widest`` of them in one tensor.
    """

    scale: int
    reach: int | None
    outputs: int
    elements: int
    widest: int

    def __call__(self, x: Tensor, backend: str | None) -> Tensor: ...


class Span(NamedTuple):
    """Pixels start..stop along one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def times(self, scale: int) -> Span:
        return Span(self.start * scale, self.stop * scale)

    def grown(self, by: int, size: int) -> Span:
        """``by`` more on both sides, inside an axis of ``size``."""
        return Span(max(self.start - by, 0), min(self.stop + by, size))


def segments(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, those with attention alone, those between them together."""
    local: list[Layer] = []
    for layer in layers:
        if layer.reach is not None:
            local.append(layer)
            continue
        if local:
            yield local
        local = []
        yield [layer]
    if local:
        yield local


def cuts(size: int, tile: int) -> list[Span]:
    """An axis of ``size`` in as few parts of at most ``tile`` as there can be, about equal."""
    parts = -(-size // tile)
    edges = [i * size // parts for i in range(parts + 1)]
    return [Span(*pair) for pair in zip(edges, edges[1:], strict=False)]


def scale_of(layers: Sequence[Layer]) -> int:
    scale = 1
    for layer in layers:
        scale *= layer.scale
    return scale


def needed(layers: Sequence[Layer], out: Span, size: int) -> list[Span]:
    """What of an axis every layer must see, and last what comes out, so that ``out`` is right. ``size``: of the first
    layer's input."""
    spans = [out]
    scale = scale_of(layers)
    for layer in reversed(layers):
        scale //= layer.scale
        assert layer.reach is not None
        inner = Span(spans[0].start // layer.scale, -(-spans[0].stop // layer.scale))
        spans.insert(0, inner.grown(layer.reach, size * scale))
    return spans


def reach_of(layers: Sequence[Layer]) -> int:
    """How many pixels of the first layer's input beyond its own a tile needs to be exact."""
    far, scale = 1 << 20, scale_of(layers)
    return far - needed(layers, Span(far * scale, (far + 1) * scale), 1 << 40)[0].start


def run_exact(layers: Sequence[Layer], x: Tensor, tile: int, backend: str | None, out: Tensor | None = None) -> Tensor:
    """The layers on x (B, C, H, W) in tiles of at most ``tile`` pixels of x a side, into ``out`` if there is one."""
    scale = scale_of(layers)
    out = _empty(layers, x, scale) if out is None else out
    for down in cuts(x.shape[2], tile):
        rows = needed(layers, down.times(scale), x.shape[2])
        for across in cuts(x.shape[3], tile):
            columns = needed(layers, across.times(scale), x.shape[3])
            part = _run_cropped(layers, x, rows, columns, backend)
            out[:, :, rows[-1].start : rows[-1].stop, columns[-1].start : columns[-1].stop] = part
    return out


def _empty(layers: Sequence[Layer], x: Tensor, scale: int) -> Tensor:
    shape = (len(x), layers[-1].outputs, scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _run_cropped(
    layers: Sequence[Layer], x: Tensor, rows: list[Span], columns: list[Span], backend: str | None
) -> Tensor:
    x = _crop(x, rows[0], columns[0])
    for i, layer in enumerate(layers):
        y, top, left = layer(x, backend), rows[i].start * layer.scale, columns[i].start * layer.scale
        down, across = rows[i + 1], columns[i + 1]
        x = _crop(y, Span(down.start - top, down.stop - top), Span(across.start - left, across.stop - left))
    return x


def _crop(x: Tensor, rows: Span, columns: Span) -> Tensor:
    x = x[:, :, rows.start : rows.stop, columns.start : columns.stop]
    return x.contiguous(memory_format=torch.channels_last)


def run_blended(
    layers: Sequence[Layer], x: Tensor, tile: int, overlap: int, backend: str | None, out: Tensor | None = None
) -> Tensor:
    """As :func:`run_exact`, but every tile starts from ``overlap`` pixels more a side and sees nothing beyond. Where
    tiles overlap, their weights rise and fall along a line. Not exact: see docs/decoder.md for the errors."""
    scale = scale_of(layers)
    rows, columns = (_weighted(size, tile, overlap, scale, x.device) for size in x.shape[2:])
    shape = (len(x), layers[-1].outputs, scale * x.shape[2], scale * x.shape[3])
    total = torch.zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for down, down_weight in rows:
        for across, across_weight in columns:
            part = _crop(x, down, across)
            for layer in layers:
                part = layer(part, backend)
            weight = down_weight[:, None] * across_weight
            down_out, across_out = down.times(scale), across.times(scale)
            total[:, :, down_out.start : down_out.stop, across_out.start : across_out.stop] += part * weight
    return total.to(x.dtype) if out is None else out.copy_(total)


def _weighted(size: int, tile: int, overlap: int, scale: int, device: torch.device) -> list[tuple[Span, Tensor]]:
    """For every tile along an axis what it starts from, and the weights of what it gives; they add up to 1 over all."""
    spans, ramps = [], []
    for core in cuts(size, tile):
        span = core.grown(overlap, size)
        at = torch.arange(span.start * scale, span.stop * scale, device=device) + 0.5
        ramp = torch.ones_like(at)
        for edge, sign, inside in ((core.start, 1, core.start > 0), (core.stop, -1, core.stop < size)):
            if inside and overlap:
                ramp *= (0.5 + sign * (at - edge * scale) / (2 * overlap * scale)).clamp(0, 1)
        spans.append(span)
        ramps.append(ramp)
    total = torch.zeros(size * scale, device=device)
    for span, ramp in zip(spans, ramps, strict=True):
        total[span.start * scale : span.stop * scale] += ramp
    return [
        (span, ramp / total[span.start * scale : span.stop * scale]) for span, ramp in zip(spans, ramps, strict=True)
    ]
