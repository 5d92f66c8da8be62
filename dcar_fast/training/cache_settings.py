"""Settings of ``dcar-fast cache``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dcar_fast.config import _is_int
from dcar_fast.training.settings import DataSettings, _Settings


@dataclass(frozen=True)
class CacheSettings(_Settings):
    """What to cache, and with which models."""

    output: str
    """Folder to write; run again, an interrupted cache goes on."""
    tokenizer: str
    """Folder of the tokenizer: one that train-tokenizer exported, a pipeline's, or a released DC-HT."""
    text_encoder: str = ""
    """Folder or hub id of a frozen text encoder whose states are cached too; "": captions alone."""
    text_length: int = 300
    """Tokens that prompts are padded or cut to, as the generator wants them."""
    data: DataSettings = field(default_factory=DataSettings)
    """Where pictures and captions come from."""
    examples: int = 0
    """How many; 0: each picture of a folder once (endless and streamed data need a number)."""
    batch_size: int = 32
    """Pictures encoded together."""
    residual_dtype: Literal["float32", "float16"] = "float32"
    """float16 takes half the space and rounds the residuals by at most 2^-11 of each value."""
    shard_size: int = 2048
    """Examples in a file."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        for name in ("output", "tokenizer"):
            self._require(name, isinstance(getattr(self, name), str) and getattr(self, name) != "", "a folder")
        self._require("examples", _is_int(self.examples) and self.examples >= 0, "an integer >= 0")
        self._require_positive_ints("batch_size", "shard_size", "text_length")
        self._require_choice("residual_dtype", ("float32", "float16"))
        self._require_type("data", DataSettings)
        self._require("data", self.data.kind != "cache", "pictures, no cache")
        self._require_text("text_encoder", "device")
