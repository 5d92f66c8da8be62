"""What several commands take: a model, a file to write."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from dcar_fast.config import PRESETS

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(kw_only=True)
class ModelCommand:
    """What every command that runs a model takes."""

    model: str = "shapes"
    """A preset (shapes, dc-ar-256, dc-ar-512, dc-ar-1024), a folder, or a hub id."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantiser and the sampling arithmetic stay in float32."""
    engine: Literal["fast", "reference"] = "fast"
    """What samples and decodes: the fast engine, or the plain modules that it is held against."""

    def pipeline(self, rank=None):
        """rank: this process among several, each of which takes its own GPU."""
        import torch

        from dcar_fast._inputs import check_device
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.pipeline import DCARPipeline

        device = check_device((rank or Rank()).device(self.device, torch.cuda.is_available()))
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # what asks for the current GPU shall not wake another one
        options = {"device": device, "dtype": getattr(torch, self.dtype), "engine": self.engine}
        if self.model in PRESETS:
            return DCARPipeline.from_preset(self.model, **options)
        return DCARPipeline.from_pretrained(self.model, **options)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which torchrun sends, ends the work as Ctrl-C does: files are finished and temporary ones removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
