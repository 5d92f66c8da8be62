"""A cache of tokens: what the frozen tokenizer (and text encoder) made of pictures and captions, as safetensors shards.

A folder of tokens-00000.safetensors, ... and index.json, which says what made them and lists the shards. In a shard of
n examples: "ids" (n, h, w) int16 or int32; "residual" (n, h w, C) float32 or float16; "keys" and "captions" uint8, all
UTF-8 texts in a row, with "keys_ends" and "captions_ends" (n,) int64; and with a frozen text encoder "text_states"
(sum of lengths, Dt) float16 with "text_ends" (n,) int64: padding is not stored.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dcar_fast.training.data.examples import CachedExample
from dcar_fast.training.data.order import EpochOrder, fingerprint

log = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT, VERSION = "dcar_fast token cache", 1
RESIDUAL_DTYPES = ("float32", "float16")
DTYPES = {"int16": "I16", "int32": "I32", "float16": "F16", "float32": "F32"}  # names in safetensors


@dataclass
class CacheIndex:
    """What index.json says.

    tokenizer, text_encoder: fingerprints of what made the tensors (text_encoder None: captions alone are stored);
    data: JSON values that name the source. residual_mean, residual_std: over all values of all residuals. position: of
    the source, behind the last example stored. complete: writing was finished. shards: "file", "count" and "bytes".
    """

    cache_id: str
    tokenizer: str
    text_encoder: str | None
    data: dict[str, Any]
    codebook_size: int
    residual_dtype: str
    grid: tuple[int, int] | None = None
    latent_channels: int = 0
    text_length: int = 0
    text_dim: int = 0
    residual_sum: float = 0.0
    residual_square_sum: float = 0.0
    position: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Examples stored."""
        return sum(shard["count"] for shard in self.shards)

    @property
    def ids_dtype(self) -> str:
        """The smallest of int16 and int32 that holds all ids."""
        return "int16" if self.codebook_size <= 2**15 else "int32"

    @property
    def residual_mean(self) -> float:
        """Of all values of all residuals; 0 while there are none."""
        return self.residual_sum / self._values if self._values else 0.0

    @property
    def residual_std(self) -> float:
        """Standard deviation of all values of all residuals; 0 while there are none."""
        variance = self.residual_square_sum / self._values - self.residual_mean**2 if self._values else 0.0
        return max(0.0, variance) ** 0.5

    @property
    def _values(self) -> int:
        return self.count * self.grid[0] * self.grid[1] * self.latent_channels if self.grid else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the derived ones for readers."""
        derived = {"count": self.count, "residual_mean": self.residual_mean, "residual_std": self.residual_std}
        return {"format": FORMAT, "version": VERSION, **derived, **vars(self)}


def read_index(folder: str | Path) -> CacheIndex:
    """The index of a cache; ``ValueError`` if there is none, or it is of another format or version, or damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"data.path: {str(folder)!r} is no cache of tokens, it has no {INDEX}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if values.get("version") != VERSION:
            raise ValueError(f"its version is {values.get('version')!r}, this release reads {VERSION}")
        for name in ("format", "version", "count", "residual_mean", "residual_std"):
            values.pop(name)
        index = CacheIndex(**values)
        index.grid = tuple(index.grid) if index.grid is not None else None
        if index.residual_dtype not in RESIDUAL_DTYPES or any(
            not isinstance(shard["file"], str) or Path(shard["file"]).name != shard["file"] or shard["count"] < 1
            for shard in index.shards
        ):
            raise ValueError("its entries make no sense")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return index


class CachedSource:
    """Random access to a cache of tokens, in a new order every epoch; tensors are read from the files when needed.

    ``index`` is the :class:`CacheIndex`. ``ValueError`` if the folder is no cache, is empty, or has a shard that is
    missing, truncated or of another cache.
    """

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        self.path, self.seed = Path(path), seed
        self.index = read_index(path)
        if not self.index.count:
            raise ValueError(f"data.path: the cache {str(path)!r} has no examples")
        if not self.index.complete:
            log.warning("the cache %s was not finished: using its %d examples", path, self.index.count)
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.index.shards])
        self._order = EpochOrder(self.index.count, seed)
        self._open: dict[int, tuple[Any, dict[str, np.ndarray]]] = {}
        for number in range(len(self.index.shards)):
            self._check(number)

    def __len__(self) -> int:
        """Examples in the cache."""
        return self.index.count

    @property
    def fingerprint(self) -> str:
        """Of the cache, the number of its examples and the seed: what their order depends on."""
        return fingerprint(self.index.cache_id, len(self), self.seed)

    def check_made_by(self, tokenizer: str, text_encoder: str | None) -> None:
        """``ValueError`` unless the cache was made by a tokenizer and text encoder of these fingerprints."""
        for name, wanted in (("tokenizer", tokenizer), ("text_encoder", text_encoder)):
            found = getattr(self.index, name)
            if found != wanted:
                raise ValueError(f"the cache {str(self.path)!r} was made with {name} {found!r}, this one is {wanted!r}")

    def example(self, index: int) -> CachedExample:
        """Example ``index`` >= 0 of the endless stream. ``ValueError`` if its shard holds what cannot be."""
        epoch, place = divmod(index, len(self))
        row = int(self._order.epoch(epoch)[place])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._read(number, row - int(self._starts[number]))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # open files stay in their process

    def _read(self, number: int, row: int) -> CachedExample:
        file, ends = self._opened(number)

        def ragged(name: str, ends_name: str) -> np.ndarray | None:
            start = int(ends[ends_name][row - 1]) if row else 0
            end = int(ends[ends_name][row])
            return file.get_slice(name)[start:end] if end > start else None

        where = f"{self._file(number)}, example {row}"
        ids = file.get_slice("ids")[row : row + 1][0].astype(np.int64)
        residual = file.get_slice("residual")[row : row + 1][0].astype(np.float32)
        if ids.min() < 0 or ids.max() >= self.index.codebook_size or not np.isfinite(residual).all():
            raise ValueError(f"{where} is damaged: ids out of 0..{self.index.codebook_size - 1}, or infinite residuals")
        tensors = {"ids": ids, "residual": residual}
        if self.index.text_encoder is not None:
            states = np.zeros((self.index.text_length, self.index.text_dim), np.float16)
            used = ragged("text_states", "text_ends")
            length = 0 if used is None else len(used)
            if length:
                states[:length] = used
            tensors |= {"text_states": states, "text_mask": np.arange(self.index.text_length) < length}
        texts = []
        for name in ("keys", "captions"):
            characters = ragged(name, f"{name}_ends")
            texts.append("" if characters is None else characters.tobytes().decode("utf-8"))
        return CachedExample(*texts, tensors)

    def _opened(self, number: int) -> tuple[Any, dict[str, np.ndarray]]:
        """The shard, mapped into memory, and its tables of ends."""
        if number not in self._open:
            file = safe_open(self._file(number), framework="numpy")
            names = ["keys_ends", "captions_ends"] + (["text_ends"] if self.index.text_encoder is not None else [])
            self._open[number] = file, {name: file.get_tensor(name) for name in names}
        return self._open[number]

    def _file(self, number: int) -> Path:
        return self.path / self.index.shards[number]["file"]

    def _check(self, number: int) -> None:
        """``ValueError`` unless the shard is there, whole, of this cache, and has the tensors it must have."""
        path, entry = self._file(number), self.index.shards[number]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"it has {size} bytes, {entry['bytes']} were written")
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("cache_id") != self.index.cache_id or metadata.get("shard") != str(number):
                    raise ValueError("it belongs to another cache")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            wrong = [name for name, want in self._layout(entry["count"]).items() if found.get(name) != want]
            if wrong:
                raise ValueError(f"tensors {wrong} are missing or have another shape or dtype")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is no usable shard of its cache: {error}") from error

    def _layout(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of the tensors whose shape does not depend on texts."""
        height, width = self.index.grid
        ends = ["keys_ends", "captions_ends"] + (["text_ends"] if self.index.text_encoder is not None else [])
        return {
            "ids": (DTYPES[self.index.ids_dtype], (count, height, width)),
            "residual": (DTYPES[self.index.residual_dtype], (count, height * width, self.index.latent_channels)),
            **{name: ("I64", (count,)) for name in ends},
        }
