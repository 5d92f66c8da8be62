"""Which model a command works with, and where: what drawing and evaluation take alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dcar_fast.config import PRESETS, _Config

if TYPE_CHECKING:
    import torch

    from dcar_fast.bulk.ranks import Rank
    from dcar_fast.pipeline import DCARPipeline


@dataclass(frozen=True, kw_only=True)
class ModelChoice(_Config):
    """A model, its device, precision and engine. Nothing is checked before :meth:`pipeline` or :meth:`_check_model`."""

    model: str = "shapes"
    """A preset (shapes, dc-ar-256, dc-ar-512, dc-ar-1024), a folder, or a hub id."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantiser and the sampling arithmetic stay in float32."""
    engine: Literal["fast", "reference"] = "fast"
    """What samples and decodes: the fast engine, or the plain modules that it is held against."""

    def pipeline(self, rank: Rank | None = None) -> DCARPipeline:
        """The model, with the trained weights of a preset that has some; rank: this process among several, each of
        which takes its own GPU. ``ValueError`` for a device or a model that is not there."""
        import torch

        from dcar_fast.pipeline import DCARPipeline

        device = choose_device(self.device, rank)
        options = {"device": device, "dtype": getattr(torch, self.dtype), "engine": self.engine}
        if self.model in PRESETS:
            return DCARPipeline.from_preset(self.model, **options)
        return DCARPipeline.from_pretrained(self.model, **options)

    def _check_model(self) -> None:
        """``ValueError`` for values that can name nothing."""
        self._require("model", isinstance(self.model, str) and bool(self.model), "a preset, a folder or a hub id")
        self._require("device", isinstance(self.device, str) and bool(self.device), "the name of a device")
        self._require("dtype", self.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16")
        self._require("engine", self.engine in ("fast", "reference"), "'fast' or 'reference'")


def choose_device(name: str, rank: Rank | None = None) -> torch.device:
    """The device of a name such as "auto", "cpu" or "cuda:1"; on several GPUs that of this process.

    ``ValueError`` for one that is not there.
    """
    import torch

    from dcar_fast._inputs import check_device
    from dcar_fast.bulk.ranks import Rank

    device = check_device((rank or Rank()).device(name, torch.cuda.is_available()))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for the current GPU shall not wake another one
    return device
