"""Pictures of a folder, or of the held-out shapes, in batches for the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcar_fast.training.data.examples import BrokenExample
from dcar_fast.training.data.pictures import MAX_PIXELS, SUFFIXES, decode_picture, square
from dcar_fast.training.shapes import ShapesSource

log = logging.getLogger(__name__)


class PictureFolder:
    """The pictures of a folder and its subfolders in the order of their names, as batches (B, 3, H, W) uint8.

    size: side of the square that is cut out of their middle and resized; None leaves them as they are, and a batch ends
    where the next picture has another size. count: at most so many, the first ones. Pictures that cannot be read are
    left out, logged and listed in ``skipped``. ``ValueError`` for a folder without pictures.
    """

    def __init__(
        self, path: str | Path, size: int | None = None, batch_size: int = 16, count: int | None = None
    ) -> None:
        self.path, self.size, self.batch_size, self.count = Path(path), size, batch_size, count
        self.skipped: list[Path] = []
        if not self.path.is_dir():
            raise ValueError(f"{path} must be a folder of pictures, there is none")
        self.files = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(self.path)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not self.files:
            raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")

    def __iter__(self) -> Iterator[Tensor]:
        self.skipped = []
        batch: list[np.ndarray] = []
        taken = 0
        for file in self.files:
            if taken == self.count:
                break
            try:
                picture = self._read(file)
            except BrokenExample as error:
                log.warning("%s is left out: %s", file, error)
                self.skipped.append(file)
                continue
            if batch and (len(batch) == self.batch_size or batch[0].shape != picture.shape):
                yield _stack(batch)
                batch = []
            batch.append(picture)
            taken += 1
        if batch:
            yield _stack(batch)

    def _read(self, file: Path) -> np.ndarray:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BrokenExample("unreadable file", error.strerror) from error
        image = decode_picture(data, self.size or MAX_PIXELS)  # never decoded smaller than it is
        return square(image, self.size) if self.size else np.asarray(image)


def held_out_shapes(size: int, batch_size: int, count: int, seed: int = 0) -> Iterator[Tensor]:
    """``count`` pictures of the shapes data that no training saw, as batches (B, 3, size, size) uint8."""
    source = ShapesSource(size, seed, held_out=True)
    for start in range(0, count, batch_size):
        yield _stack([source.example(i).image for i in range(start, min(start + batch_size, count))])


def _stack(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
