"""Writing a cache of tokens (:mod:`dcar_fast.training.data.cached`), in as many runs as it takes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from dcar_fast._files import write_atomically
from dcar_fast.training.data.cached import INDEX, RESIDUAL_DTYPES, CacheIndex, read_index


class CacheWriter:
    """Appends examples to the cache in ``folder``; made if it is not there, continued if it is.

    tokenizer, text_encoder (None: no text states), data, codebook_size and residual_dtype are as in
    :class:`~dcar_fast.training.data.cached.CacheIndex`; a cache made with others is a ``ValueError``. float16 halves
    the residuals' space and rounds them by at most 2^-11 of each value (normalised vectors differ by less than 2);
    float32 keeps them bit for bit.

    A shard is written when ``shard_size`` examples or more have come, and listed in index.json after that: after an
    interruption ``index.count`` examples are there, and ``index.position`` says where their source goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: str,
        codebook_size: int,
        text_encoder: str | None = None,
        data: dict[str, Any] | None = None,
        residual_dtype: str = "float32",
        shard_size: int = 2048,
    ) -> None:
        if residual_dtype not in RESIDUAL_DTYPES:
            raise ValueError(f"residual_dtype must be one of {RESIDUAL_DTYPES}, got {residual_dtype!r}")
        for name, value in (("shard_size", shard_size), ("codebook_size", codebook_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.folder, self.shard_size = Path(folder), shard_size
        wanted = {
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "data": json.loads(json.dumps(data or {})),  # as it will be read
            "codebook_size": codebook_size,
            "residual_dtype": residual_dtype,
        }
        if (self.folder / INDEX).exists():
            self.index = read_index(self.folder)
            for name, value in wanted.items():
                if getattr(self.index, name) != value:
                    raise ValueError(
                        f"the cache {str(folder)!r} was made with {name} {getattr(self.index, name)!r:.200}, now it is "
                        f"{value!r:.200}; choose another folder"
                    )
        else:
            if any(self.folder.glob("*.safetensors")):
                raise ValueError(f"{str(folder)!r} holds safetensors files of something else; choose another folder")
            self.index = CacheIndex(cache_id=uuid.uuid4().hex, **wanted)
            self._write_index()
        self._position = self.index.position
        self._pending: list[dict[str, Any]] = []

    def add(
        self,
        keys: Sequence[str],
        captions: Sequence[str],
        ids: Tensor,
        residual: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        position: dict[str, Any] | None = None,
    ) -> None:
        """Takes B examples: ids (B, h, w) integers, residual (B, h w, C) float; with a text encoder text_states
        (B, T, Dt) float and text_mask (B, T) bool, True first. position: of the source, right behind them.

        ``ValueError`` for what does not fit together or to the examples before.
        """
        self._check(keys, captions, ids, residual, text_states, text_mask)
        self.index.complete = False
        ids_array = ids.cpu().numpy().astype(self.index.ids_dtype)
        residual_array = residual.detach().float().cpu().numpy().astype(self.index.residual_dtype)
        lengths = text_mask.sum(1).tolist() if text_mask is not None else [0] * len(keys)
        for b, length in enumerate(lengths):
            example = {"keys": keys[b], "captions": captions[b], "ids": ids_array[b], "residual": residual_array[b]}
            if text_states is not None:
                example["text_states"] = text_states[b, :length].detach().cpu().to(torch.float16).numpy()
            self._pending.append(example)
        self._position = position or {}
        if len(self._pending) >= self.shard_size:
            self._flush()

    def finish(self) -> CacheIndex:
        """Writes what is left and marks the cache as complete; its index."""
        self.index.complete = True
        self._flush()
        return self.index

    @property
    def count(self) -> int:
        """Examples taken, those not yet written included."""
        return self.index.count + len(self._pending)

    def _flush(self) -> None:
        """Writes the pending examples as a shard, then the index that lists it."""
        if self._pending:
            number, count = len(self.index.shards), len(self._pending)
            path = self.folder / f"tokens-{number:05d}.safetensors"
            tensors = _stack(self._pending)
            metadata = {"cache_id": self.index.cache_id, "shard": str(number)}
            write_atomically(path, lambda temporary: _save(tensors, metadata, temporary))
            values = tensors["residual"].astype(np.float64)
            self.index.residual_sum += float(values.sum())
            self.index.residual_square_sum += float((values**2).sum())
            self.index.shards.append({"file": path.name, "count": count, "bytes": path.stat().st_size})
            self._pending = []
        self.index.position = self._position
        self._write_index()

    def _write_index(self) -> None:
        text = json.dumps(self.index.to_dict(), indent=1)
        write_atomically(self.folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _check(self, keys, captions, ids, residual, text_states, text_mask) -> None:
        """Compares one batch with itself and with the index, which the first batch completes."""
        batch = len(keys)
        if not batch or len(captions) != batch:
            raise ValueError(f"keys and captions must be as many, at least one, got {batch} and {len(captions)}")
        if ids.dim() != 3 or ids.shape[0] != batch or ids.is_floating_point():
            raise ValueError(f"ids must be ({batch}, h, w) integers, got {tuple(ids.shape)} {ids.dtype}")
        if int(ids.min()) < 0 or int(ids.max()) >= self.index.codebook_size:
            raise ValueError(
                f"ids must be in 0..{self.index.codebook_size - 1}, got {int(ids.min())}..{int(ids.max())}"
            )
        grid = (ids.shape[1], ids.shape[2])
        if residual.dim() != 3 or residual.shape[:2] != (batch, grid[0] * grid[1]):
            raise ValueError(f"residual must be ({batch}, {grid[0] * grid[1]}, C), got {tuple(residual.shape)}")
        if not residual.isfinite().all():
            raise ValueError(f"residual must be finite, it is not for {keys[0]!r} or one of the {batch - 1} behind it")
        if (text_states is None) != (self.index.text_encoder is None) or (text_states is None) != (text_mask is None):
            raise ValueError("text_states and text_mask come together, and exactly when there is a text_encoder")
        text = (0, 0)
        if text_states is not None:
            text = (text_states.shape[1], text_states.shape[2])
            if text_states.shape[0] != batch or text_mask.shape != (batch, text[0]) or text_mask.dtype != torch.bool:
                raise ValueError(
                    f"text_states and text_mask must be ({batch}, T, Dt) float and ({batch}, T) bool, got "
                    f"{tuple(text_states.shape)} and {tuple(text_mask.shape)} {text_mask.dtype}"
                )
            if (text_mask[:, 1:] & ~text_mask[:, :-1]).any():
                raise ValueError("text_mask must be True first and then False in every row")
            if not text_states[text_mask].abs().lt(65504).all():
                raise ValueError("text_states must be finite in float16, below 65504")
        shapes = {"grid": grid, "latent_channels": residual.shape[2], "text_length": text[0], "text_dim": text[1]}
        for name, value in shapes.items():
            if self.index.grid is not None and getattr(self.index, name) != value:
                raise ValueError(f"{name} must be {getattr(self.index, name)} as in the examples before, got {value}")
        for name, value in shapes.items():
            setattr(self.index, name, value)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what killed processes left half written; no other process may be writing."""
    for pattern in (".tokens-*.safetensors", ".index-*.json"):
        for path in Path(folder).glob(pattern):
            path.unlink()


def _save(tensors: dict[str, np.ndarray], metadata: dict[str, str], path: Path) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk
        raise ValueError(f"{path.parent} cannot be written: {error}") from error


def _stack(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The tensors of a shard."""
    tensors = {name: np.stack([example[name] for example in examples]) for name in ("ids", "residual")}
    for name in ("keys", "captions"):
        texts = [example[name].encode("utf-8") for example in examples]
        tensors[name] = np.frombuffer(b"".join(texts), np.uint8)
        tensors[f"{name}_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    if "text_states" in examples[0]:
        tensors["text_states"] = np.concatenate([example["text_states"] for example in examples])
        tensors["text_ends"] = np.cumsum([len(example["text_states"]) for example in examples], dtype=np.int64)
    return tensors
