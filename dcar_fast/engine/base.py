"""What every engine offers to the sampler, and what it keeps between calls."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dcar_fast.config import DCARConfig
from dcar_fast.engine.graph import Graphs, cuda_recorder
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import LatentNoise, TokenNoise

FIRST_PASSES = 64  # kept per model: one for every prompt length and grid met lately


class Engine(ABC):
    """A generator's weights, packed in one precision for one device, and its stages without what cannot matter.

    "Texts" are what :meth:`read` made of text states; only the engine knows what is in them. Hidden states are
    (B or 2B, n, D): conditional rows first, then unconditional ones.
    """

    def __init__(self, config: DCARConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.lock = threading.RLock()  # whoever samples holds it: what is kept between calls is shared
        self.capture_failed: str | None = None  # and why
        self._first: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def constants(self, grid: tuple[int, int], length: int) -> Any:
        """What a graph reads beside its inputs and the weights, and must keep alive."""

    def no_graph(self) -> str | None:
        """Why calls on this engine cannot be captured in a CUDA graph; None where they can."""
        if self.device.type != "cuda":
            return f"CUDA graphs need a CUDA device, this is {self.device.type}"
        return self.capture_failed

    @cached_property
    def graphs(self) -> Graphs:
        """The captured calls of all samplers on these weights; on a GPU only."""
        return Graphs(cuda_recorder(self.device))

    @abstractmethod
    def read(self, states: Tensor, mask: Tensor) -> Any:
        """Text states (B, T, Dt) and mask (B, T) bool -> the texts of B prompts and their unconditional rows."""

    @abstractmethod
    def hidden(
        self,
        ids: Tensor,
        grid: tuple[int, int],
        texts: Any,
        guided: bool,
        rows: Tensor | None = None,
        alike: bool = False,
    ) -> Tensor:
        """The trunk: ids (B, N) -> hidden states before the last norm, of the positions ``rows`` (B, n) or of all.

        alike: all rows of ids are the same.
        """

    @abstractmethod
    def null_hidden(self, ids: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
        """(B, N, D) of unconditional rows alone, for ids (B, N) whose rows are all the same."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, V), for traces."""

    @abstractmethod
    def choose(
        self,
        cond: Tensor,
        uncond: Tensor | None,
        *,
        guidance: float,
        softmax_temperature: float,
        tau: float,
        noise: Tensor | TokenNoise,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (R, D) of open positions -> ids (R,) int64 and confidence (R,) float32: ``ops.sample_tokens``
        after the last norm."""

    @abstractmethod
    def denoise(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor | LatentNoise],
        *,
        guidance: float,
        dialect: Dialect,
        progress: Callable[[int], None],
    ) -> Tensor:
        """Hidden states (R, D), [cond; uncond] unless guidance is 1 -> residuals (R/2 or R, C) float32."""

    def first_unconditional(self, grid: tuple[int, int], mask: Tensor, prompts: Sequence[Hashable]) -> Tensor:
        """Hidden states (B, N, D) of an unconditional pass over nothing but MASK. They depend on the mask (B, T)
        alone, that is, on the length of the prompt, so they are kept. prompts: B keys, equal where the masks are."""
        keys = [(grid, mask.shape[1], prompt) for prompt in prompts]
        missing = {key: row for row, key in enumerate(keys) if key not in self._first}
        if missing:
            picked = torch.stack([mask[row] for row in missing.values()])
            ids = torch.full((len(picked), grid[0] * grid[1]), self.config.mask_id, device=mask.device)
            self._first.update(zip(missing, self.null_hidden(ids, grid, picked).unbind(), strict=True))
        found = torch.stack([self._first[key] for key in keys])
        for key in keys:
            self._first.move_to_end(key)
        while len(self._first) > FIRST_PASSES:
            self._first.popitem(last=False)
        return found


def layer_norm(x: Tensor) -> Tensor:
    """The trunk's LN without affine."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x (R, N, ...) at positions ``rows`` (R, n) -> (R, n, ...)."""
    index = rows.reshape(*rows.shape, *(1,) * (x.dim() - 2)).expand(*rows.shape, *x.shape[2:])
    return x.gather(1, index)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """What is packed says itself in which precision it computes."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
