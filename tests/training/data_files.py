"""Pictures, folders and tar shards for the tests of training data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcar_fast.training.settings import DataSettings


def settings(kind: str, path: str | Path = "", **changes: Any) -> DataSettings:
    """Small pictures, no worker processes."""
    return DataSettings(kind=kind, path=str(path), **{"size": 16, "workers": 0, **changes})


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """Plain pictures whose colour tells their number in 0..255; noise in one corner makes files of usual sizes."""
    pixels = np.full((height, width, 3), (number, 255 - number, 128), np.uint8)
    corner = pixels[:4, :4]
    corner[:] = np.random.default_rng(number).integers(0, 256, corner.shape)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    """000.png ... with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}\n")
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_shards(folder: Path, sizes: list[int]) -> Path:
    """Shards of sizes[i] samples; keys and captions are numbered through, the picture's red is the number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for i, size in enumerate(sizes):
        files = {}
        for _ in range(size):
            files[f"{number:04d}.png"] = encoded(picture(number % 256))
            files[f"{number:04d}.txt"] = f"picture {number}".encode()
            number += 1
        write_tar(folder / f"{i:03d}.tar", files)
    return folder
