"""Calls of a patched head in CUDA graphs: one for each bucket of rows, whatever the guidance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.engine.fused_head import FusedHead
from dcar_fast.engine.graph import CaptureError, Graphs, Recorder, cuda_recorder
from dcar_fast.engine.head import Head
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import LatentNoise
from dcar_fast.ops.latent_noise import latent_noise

logger = logging.getLogger(__name__)

BUCKETS = tuple(sorted({2**i for i in range(13)} | {3 * 2**i for i in range(11)}))  # 1, 2, 3, 4, 6, ..., 4096
GRAPHS = 2 * len(BUCKETS)  # with guidance and without

Noise = Mapping[str, Tensor]  # "normals" (K, rows, C), or "seeds" and "tokens" (rows,)


def bucket(rows: int) -> int | None:
    """The smallest one that holds ``rows``, None above the largest: then launching is not what takes the time."""
    return next((size for size in BUCKETS if size >= rows), None)


def recorder(device: torch.device) -> Recorder | None:
    """What records on this device, None where there are no graphs."""
    return cuda_recorder(device) if device.type == "cuda" else None


class PackedHead:
    """A head's packed weights, and the graphs that read them."""

    def __init__(self, engine: Head | FusedHead, device: torch.device) -> None:
        self.engine, self.channels = engine, engine.channels
        on = recorder(device)
        self.graphs = None if on is None else Graphs(on, GRAPHS)
        self.failed: str | None = None

    def __call__(
        self, z: Tensor, start: Tensor, noise: Noise, guidance: float, temperature: float, dialect: Dialect
    ) -> Tensor:
        """z (rows, Z) and start (rows, C) -> samples (rows, C), one launch after the other."""
        settings = {"guidance": guidance, "temperature": temperature, "dialect": dialect}
        return self.engine(z, start, self._latent(noise), **settings)

    def replay(
        self, z: Tensor, start: Tensor, noise: Noise, guidance: float, temperature: float, dialect: Dialect
    ) -> Tensor:
        """The same in a graph, captured when its bucket is first needed. Where that fails, or the rows are too many, as
        it is; a warning says why capturing failed, once."""
        branches = 1 if guidance == 1.0 else 2
        rows = len(z) // branches
        size = bucket(rows)
        if size is None or self.graphs is None or self.failed is not None:
            return self(z, start, noise, guidance, temperature, dialect)
        inputs = {"z": pad(z, 0, branches, size), "start": pad(start, 0, branches, size)}
        inputs |= {name: pad(x, 1 if name == "normals" else 0, branches, size) for name, x in noise.items()}
        if branches == 2:
            inputs["guidance"] = torch.full((), guidance, device=z.device)

        def sample(static: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            settings = {"guidance": static.get("guidance", 1.0), "temperature": temperature, "dialect": dialect}
            return (self.engine(static["z"], static["start"], self._latent(static), **settings),)

        key = (branches, size, z.dtype, tuple(noise), temperature, dialect)
        try:
            (found,) = self.graphs.run(key, sample, inputs)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self.failed = str(error)
            logger.warning("the diffusion head runs without CUDA graphs: %s", error)
            return self(z, start, noise, guidance, temperature, dialect)
        return found.unflatten(0, (branches, size))[:, :rows].flatten(0, 1)

    def _latent(self, noise: Noise) -> Callable[[int], Tensor | LatentNoise]:
        if "normals" in noise:
            return lambda i: noise["normals"][i]
        seeds, tokens = noise["seeds"], noise["tokens"]
        if isinstance(self.engine, FusedHead):
            return lambda i: LatentNoise(seeds, tokens, i)
        return lambda i: latent_noise(seeds, tokens, self.channels, i, initial=False)


def pad(x: Tensor, axis: int, branches: int, size: int) -> Tensor:
    """Zeros behind the rows of each branch, up to ``size``; the rows are along ``axis``."""
    parts = x.unflatten(axis, (branches, -1))
    more = size - parts.shape[axis + 1]
    behind = [0, 0] * (parts.dim() - axis - 2)
    return F.pad(parts, (*behind, 0, more)).flatten(axis, axis + 1)
