"""How much memory decoding takes and how much there is, and what to do when it runs out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dcar_fast.engine.tiling import Layer, Span, needed, scale_of, segments

MODEST = 1 << 28  # bytes that need no look at what is free
SHARE = 0.8  # of the free memory that a plan may use
SMALLEST_TILE = 2  # latents; smaller ones save nothing more, for a tile starts from several latents around it
LARGEST_TENSOR = 2**31 - 1  # elements that libraries index with 32 bits

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """``images`` at a time, in tiles of ``tile`` latents a side; None: in one piece."""

    images: int
    tile: int | None

    def smaller(self, size: tuple[int, int]) -> Plan | None:
        """What to try when this one ran out of memory for latents of ``size``; None: nothing is left."""
        if self.images > 1:
            return Plan(self.images // 2, self.tile)
        tile = -(-(max(size) if self.tile is None else self.tile) // 2)
        if tile < SMALLEST_TILE or tile == self.tile or max(size) <= tile:
            return None
        return Plan(1, tile)


def peak(layers: Sequence[Layer], size: tuple[int, int], tile: int | None) -> int:
    """About how many numbers one image of ``size`` latents has in memory at most."""
    most, scale, held = 0, 1, 0
    for part in segments(layers):
        height, width = (scale * side for side in size)
        rows, columns = (_seen(part, side, scale, tile) for side in (height, width))
        for layer, down, across in zip(part, rows, columns, strict=False):
            most = max(most, held + layer.elements * down * across)
        scale *= scale_of(part)
        held = part[-1].outputs * size[0] * size[1] * scale**2 if tile else 0  # the whole image around a tile
    return most


def _seen(part: list[Layer], side: int, scale: int, tile: int | None) -> list[int]:
    """Pixels along an axis at every layer's input."""
    grow = scale_of(part)
    span = Span(0, side)
    if tile is not None and part[0].reach is not None:
        middle = max(0, side // 2 - tile * scale // 2)
        span = Span(middle, min(side, middle + tile * scale))
    if part[0].reach is None:
        return [side]
    return [span.size for span in needed(part, span.times(grow), side)]


def largest(layers: Sequence[Layer], size: tuple[int, int]) -> int:
    """How many numbers the largest tensor of one image has."""
    most, scale = 0, 1
    for layer in layers:
        most = max(most, layer.widest * size[0] * size[1] * scale**2)
        scale *= layer.scale
    return most


def plan(layers: Sequence[Layer], latents: Tensor) -> Plan:
    """As many images at a time as fit, whole if one does."""
    batch, size = len(latents), (latents.shape[2], latents.shape[3])
    whole = peak(layers, size, None)
    images = min(batch, max(1, LARGEST_TENSOR // largest(layers, size)))
    asked = images * whole * latents.itemsize
    if asked <= MODEST or latents.device.type == "meta" or _capturing(latents.device):
        return Plan(images, None)
    room = SHARE * free_memory(latents.device) / latents.itemsize
    if whole <= room and largest(layers, size) <= LARGEST_TENSOR:
        return Plan(max(1, min(images, int(room // whole))), None)
    tile = max(size)
    while tile > SMALLEST_TILE and peak(layers, size, tile) > room:
        tile = -(-tile // 2)
    return Plan(1, tile)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_memory(device: torch.device) -> float:
    """Bytes that can be had now; infinite where nobody can tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_machine(), _control_group()) if device.type == "cpu" else float("inf")


def _machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> float:
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return float("inf")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


_told: set[str] = set()


def within_memory(first: Plan, latents: Tensor, decode: Callable[[Tensor, int | None], Tensor]) -> Iterator[Tensor]:
    """``decode(some latents, tile)`` for all latents in order, with less at a time where memory runs out."""
    plan, done, size = first, 0, (latents.shape[2], latents.shape[3])
    while done < len(latents):
        part = latents[done : done + plan.images]
        images = _attempt(decode, part, plan.tile)
        if isinstance(images, Tensor):
            done += len(part)
            yield images
            continue
        smaller = None if _capturing(latents.device) else Plan(len(part), plan.tile).smaller(size)
        if smaller is None:
            raise images
        _tell(plan, smaller, images)
        del images  # and with its traceback all that was held
        if latents.device.type == "cuda":
            torch.cuda.empty_cache()
        plan = smaller


def _attempt(decode: Callable[[Tensor, int | None], Tensor], part: Tensor, tile: int | None) -> Tensor | BaseException:
    try:
        return decode(part, tile)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return error


def _tell(plan: Plan, smaller: Plan, error: BaseException) -> None:
    first = "memory" not in _told
    _told.add("memory")
    what = f"{smaller.images} at a time" if smaller.tile is None else f"in tiles of {smaller.tile} latents"
    logger.log(
        logging.WARNING if first else logging.DEBUG,
        "not enough memory to decode %d image(s) at once, going on %s (said once): %s",
        plan.images,
        what,
        str(error).partition("\n")[0],
    )
