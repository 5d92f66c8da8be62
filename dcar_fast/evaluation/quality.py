"""Evaluations of pictures against pictures: a tokenizer's reconstructions, FID of two folders."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcar_fast._model_choice import choose_device
from dcar_fast.config import PRESETS, _is_int
from dcar_fast.evaluation._base import Evaluation, network_of_fid, write_json

if TYPE_CHECKING:
    from dcar_fast.models.tokenizer import DCHT

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReconstructionEvaluation(Evaluation):
    """PSNR, SSIM, and rFID where Inception's weights are given, of a tokenizer's two paths; usage of its codes."""

    tokenizer: str = "shapes"
    """A preset, a folder of a tokenizer or of a whole model, or a released DC-HT."""
    data: str = ""
    """Folder of pictures; empty: held-out pictures of the shapes data."""
    size: int = 64
    """Side in pixels of the squares that are cut out of the pictures' middle, a multiple of the compression."""
    count: int = 600
    """Pictures at most (the first ones of the folder)."""
    batch_size: int = 16
    """Pictures at a time."""
    seed: int = 0
    """Of the shapes data."""
    inception: str = ""
    """Local file pt_inception-2015-12-05-6726825d.pth, for rFID."""
    resize: Literal["antialias", "tensorflow"] = "antialias"
    """How pictures come to Inception's 299 pixels: as torchmetrics or as the original did."""
    output: Path | None = None
    """JSON file to write."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        self._require("tokenizer", isinstance(self.tokenizer, str) and bool(self.tokenizer), "a preset or a folder")
        self._check_paths("data", "inception", needed=False)
        self._check_numbers("size", "count", "batch_size")

    def run(self) -> dict[str, Any]:
        """Prints and returns what :func:`dcar_fast.evaluation.metrics.evaluate_reconstruction` gives."""
        from dcar_fast._files import check_writable
        from dcar_fast._progress import ImageBar
        from dcar_fast.evaluation.metrics import FEW, evaluate_reconstruction
        from dcar_fast.evaluation.pictures import PictureFolder, held_out_shapes

        if self.output is not None:
            check_writable(Path(self.output))
        device = choose_device(self.device)
        network = network_of_fid(self.inception, self.resize, device, "rFID")
        tokenizer = self._load().to(device)
        multiple = tokenizer.config.compression
        if self.size % multiple:
            raise ValueError(f"size must be a multiple of {multiple}, the tokenizer's compression, got {self.size}")
        if self.data:
            batches = PictureFolder(self.data, self.size, self.batch_size, self.count)
            total = min(self.count, len(batches.files))
        else:
            batches, total = held_out_shapes(self.size, self.batch_size, self.count, self.seed), self.count
        with ImageBar(True, total) as bar:
            found = evaluate_reconstruction(tokenizer, batches, network, bar.drawn)
        found = {"tokenizer": self.tokenizer, "data": self.data or "shapes, held out", "size": self.size, **found}
        lines = [f"{found['pictures']} pictures of {self.size} x {self.size} pixels"]
        for path in ("hybrid", "discrete"):
            scores = found[path]
            rfid = f"   rFID {scores['rfid']:.3f}" if "rfid" in scores else ""
            lines.append(f"{path:<9} PSNR {scores['psnr']:.2f} dB   SSIM {scores['ssim']:.4f}{rfid}")
        codebook = found["codebook"]
        lines.append(f"codebook: {100 * codebook['usage']:.1f}% used, perplexity {codebook['perplexity']:.1f}")
        if network is not None and found["pictures"] < FEW:
            lines.append(f"rFID of fewer than {FEW} pictures is far too high")
        print("\n".join(lines))
        write_json(self.output, found)
        return found

    def _load(self) -> DCHT:
        from dcar_fast.checkpoints import find_folder, load_tokenizer
        from dcar_fast.pipeline import DCARPipeline

        if self.tokenizer in PRESETS:
            pipeline = DCARPipeline.from_preset(self.tokenizer)
            if not pipeline.trained:
                log.warning("%s has untrained weights: its reconstructions are good for tests only", self.tokenizer)
            return pipeline.tokenizer
        from dcar_fast.ops.vq_lookup import vq_lookup

        tokenizer = load_tokenizer(find_folder(self.tokenizer))
        tokenizer.quantizer.lookup = vq_lookup
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class FidEvaluation(Evaluation):
    """FID of two folders of pictures: gFID of generated ones, rFID of reconstructions."""

    real: str
    """Folder of real pictures."""
    generated: str
    """Folder of generated pictures."""
    inception: str
    """Local file pt_inception-2015-12-05-6726825d.pth."""
    size: int = 0
    """Side of the squares cut out of the pictures' middle first; 0: the pictures as they are."""
    resize: Literal["antialias", "tensorflow"] = "antialias"
    """How pictures come to Inception's 299 pixels: as torchmetrics or as the original did."""
    batch_size: int = 32
    """Pictures at a time."""
    output: Path | None = None
    """JSON file to write."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        self._check_paths("real", "generated", "inception")
        self._check_numbers("batch_size")
        self._require("size", _is_int(self.size) and self.size >= 0, "an integer >= 0")

    def run(self) -> dict[str, Any]:
        """Prints and returns what :func:`dcar_fast.evaluation.metrics.fid` gives, and the pictures left out."""
        from dcar_fast._files import check_writable
        from dcar_fast.evaluation.metrics import FEW, fid
        from dcar_fast.evaluation.pictures import PictureFolder

        if self.output is not None:
            check_writable(Path(self.output))
        network = network_of_fid(self.inception, self.resize, choose_device(self.device), "FID")
        folders = [PictureFolder(path, self.size or None, self.batch_size) for path in (self.real, self.generated)]
        found = fid(*folders, network)
        found |= {"resize": self.resize, "left_out": [str(file) for folder in folders for file in folder.skipped]}
        print(f"FID {found['fid']:.3f} ({found['generated_pictures']} pictures, {found['real_pictures']} real ones)")
        if min(found["generated_pictures"], found["real_pictures"]) < FEW:
            print(f"FID of fewer than {FEW} pictures is far too high")
        write_json(self.output, found)
        return found
