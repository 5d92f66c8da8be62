"""A folder of PNGs that know how they were made, and the list of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dcar_fast._files import check_writable, write_atomically
from dcar_fast.bulk.jobs import Job
from dcar_fast.images import save_png

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
_SAMPLED = 16  # values of each tensor that tell one model from another


class ImageFolder:
    """Where one run's images go. settings: of the sampling, model: :func:`fingerprint`; both are kept in every PNG."""

    def __init__(self, path: str | Path, settings: dict[str, Any], model: str) -> None:
        self.path, self.settings, self.model = Path(path), settings, model
        self._warned: set[Path] = set()
        check_folder(self.path)

    def has(self, job: Job, *, whole: bool = False, others: bool = False) -> bool:
        """Whether the job's file is there and, if ``whole``, undamaged to its end.

        A file that cannot be read as an image counts as missing, with a warning. An image that is not this job's is a
        ``ValueError``, or counts as missing too where ``others`` are allowed.
        """
        path = self.path / job.file_name
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        with file:
            try:
                with Image.open(file) as image:
                    info, kind = dict(image.info), image.format
                    if whole and kind == "PNG":
                        image.verify()  # the checksums of all chunks, up to the end mark
            except Exception as error:  # whatever Pillow raises for damaged files
                if path not in self._warned:
                    log.warning("%s is damaged and counts as missing: %s", path, error)
                self._warned.add(path)
                return False
        reason = self._mismatch(job, info, kind)
        if reason and not others:
            raise ValueError(f"{path} is in the way: {reason}; choose another folder, or overwrite")
        return not reason

    def _mismatch(self, job: Job, info: dict[str, Any], kind: str | None) -> str | None:
        try:
            settings = json.loads(info["settings"])
            found = {"prompt": info["prompt"], "seed": info["seed"], "model": info["model"], **settings}
        except (KeyError, TypeError, ValueError):
            return f"this {kind} comes from elsewhere, no prompt and settings of such a run are stored in it"
        wanted = {"prompt": job.prompt, "seed": str(job.seed), "model": self.model, **self.settings}
        for name in sorted(wanted.keys() | found.keys(), key=[*wanted, *found].index):
            if found.get(name) != wanted.get(name):
                return f"its {name} is {found.get(name)!r:.60}, this run's is {wanted.get(name)!r:.60}"
        return None

    def write(self, image: Image.Image, job: Job) -> None:
        """Writes the job's PNG under a temporary name and renames it."""
        image.info["model"] = self.model
        path = self.path / job.file_name
        try:
            save_png(image, path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error

    def write_metadata(self, jobs: Sequence[Job]) -> bool:
        """Writes the list of all files in the order of the prompts if all are there, and says whether they are."""
        if not all(self.has(job, others=True) for job in jobs):
            return False
        lines = "".join(
            json.dumps({"file_name": job.file_name, "prompt": job.prompt, "seed": job.seed}, ensure_ascii=False) + "\n"
            for job in jobs
        )
        write_atomically(self.path / METADATA, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        return True


def check_folder(path: str | Path) -> None:
    """``ValueError`` unless files can be made in the folder; it is made if missing."""
    check_writable(Path(path) / METADATA)


def fingerprint(models: Iterable[nn.Module]) -> str:
    """16 hexadecimal digits of all tensors' names and shapes and of some of their values: the same on every device."""
    digest, values = hashlib.sha256(), []
    for i, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            digest.update(f"{i} {name} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().flatten()
            values.append(flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float())
    digest.update(torch.cat(values).cpu().numpy().tobytes())  # one copy from the device
    return digest.hexdigest()[:16]
