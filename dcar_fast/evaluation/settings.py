"""The evaluations as settings with a ``run()``: what ``dcar-fast evaluate`` makes its flags of.

Bad settings raise ``ValueError`` naming the field on construction; what does not fit the model or the files does at the
start of ``run()``, before any work.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcar_fast.config import PRESETS, SamplingConfig, _Config, _is_int

if TYPE_CHECKING:
    from dcar_fast.bulk.ranks import Rank
    from dcar_fast.evaluation.inception import Inception
    from dcar_fast.evaluation.shapes_eval import ShapesReport
    from dcar_fast.evaluation.shapes_validation import Validation
    from dcar_fast.models.tokenizer import DCHT
    from dcar_fast.pipeline import DCARPipeline

MOST_FAILURES = 60  # on the contact sheet


class _Evaluation(_Config):
    """The checks that several of them need."""

    def _check_numbers(self, *positive: str) -> None:
        self._require_positive_ints(*positive)
        if hasattr(self, "seed"):
            self._require("seed", _is_int(self.seed) and self.seed >= 0, "an integer >= 0")

    def _check_paths(self, *names: str, needed: bool = True) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, isinstance(value, (str, Path)) and (bool(str(value)) or not needed), "a path")


@dataclass(frozen=True, kw_only=True)
class _WithModel(_Evaluation):
    model: str = "shapes"
    """A preset (shapes, dc-ar-256, dc-ar-512, dc-ar-1024), a folder, or a hub id."""
    device: str = "auto"
    """"auto" takes a GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantiser and the sampling arithmetic stay in float32."""
    engine: Literal["fast", "reference"] = "fast"
    """What samples and decodes: the fast engine, or the plain modules that it is held against."""

    def pipeline(self, rank: Rank | None = None) -> DCARPipeline:
        """The model; rank: this process among several, each of which takes its own GPU."""
        import torch

        from dcar_fast.pipeline import DCARPipeline

        options = {"device": _device(self.device, rank), "dtype": getattr(torch, self.dtype), "engine": self.engine}
        if self.model in PRESETS:
            return DCARPipeline.from_preset(self.model, **options)
        return DCARPipeline.from_pretrained(self.model, **options)

    def _check_model(self) -> None:
        self._require("model", isinstance(self.model, str) and bool(self.model), "a preset, a folder or a hub id")
        self._require("device", isinstance(self.device, str) and bool(self.device), "the name of a device")
        self._require("dtype", self.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16")
        self._require("engine", self.engine in ("fast", "reference"), "'fast' or 'reference'")


@dataclass(frozen=True, kw_only=True)
class ReconstructionEvaluation(_Evaluation):
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
        device = _device(self.device)
        network = _inception(self.inception, self.resize, device, "rFID")
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
        _write(self.output, found)
        return found

    def _load(self) -> DCHT:
        from dcar_fast.checkpoints import find_folder, load_tokenizer
        from dcar_fast.pipeline import DCARPipeline

        if self.tokenizer in PRESETS:
            return DCARPipeline.from_preset(self.tokenizer).tokenizer
        from dcar_fast.ops.vq_lookup import vq_lookup

        tokenizer = load_tokenizer(find_folder(self.tokenizer))
        tokenizer.quantizer.lookup = vq_lookup
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation(_WithModel):
    """ShapesEval: how often pictures show what held-out prompts say, by GenEval's six categories.

    Draws the pictures into OUTPUT/images (run again, it draws what is missing), and writes OUTPUT/report.json,
    OUTPUT/prompts.jsonl and OUTPUT/failures.png.
    """

    output: Path = Path("shapes-eval")
    """Folder to write."""
    count: int = 600
    """Held-out prompts, in turn from the six categories."""
    seed: int = 0
    """Of the prompts; picture i is drawn with seed + i."""
    images: str = ""
    """Folder with 00000.png, ... of the same prompts, drawn by anything; nothing is drawn then."""
    validate: bool = False
    """Judge the checker instead of a model: true renders, shuffled prompts, spoilt pictures."""
    size: int = 64
    """Side in pixels of the renders that validate judges."""
    batch_size: int = 8
    """Prompts sampled together."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        self._check_model()
        self._check_paths("output")
        self._check_paths("images", needed=False)
        self._check_numbers("count", "batch_size", "size")
        self._require("validate", isinstance(self.validate, bool), "True or False")
        self._require("images", not (self.validate and self.images), "empty where validate is asked for")

    def run(self) -> ShapesReport | Validation | None:
        """Prints the table and returns the report; None where other processes have not drawn all of theirs yet."""
        from dcar_fast._files import check_writable

        folder = Path(self.output)
        check_writable(folder / "report.json")
        return self._validate(folder) if self.validate else self._evaluate(folder)

    def _evaluate(self, folder: Path) -> ShapesReport | None:
        from dcar_fast._files import write_atomically
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.contact_sheet import contact_sheet
        from dcar_fast.evaluation.shapes_eval import judge_pictures, picture_files, read_picture
        from dcar_fast.images import save_png
        from dcar_fast.training.shapes import held_out_prompts

        prompts = held_out_prompts(self.count, self.seed)
        images = Path(self.images) if self.images else folder / "images"
        if not self.images:
            rank = Rank.from_environment()
            drawn = self.pipeline(rank).generate_to(
                images,
                [prompt.text for prompt in prompts],
                seed=self.seed,
                batch_size=self.batch_size,
                rank=rank,
                **asdict(self.sampling),
            )
            print(drawn)
            if not drawn.complete:
                return None
        files = picture_files(images, prompts)
        report = judge_pictures(prompts, (read_picture(file) for file in files))
        lines = [json.dumps({"prompt": p.text, "category": p.ask.category}, ensure_ascii=False) for p in prompts]
        text = "\n".join(lines) + "\n"
        write_atomically(folder / "prompts.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
        report.write(folder / "report.json")
        failures = report.failures[:MOST_FAILURES]
        (folder / "failures.png").unlink(missing_ok=True)  # that of an earlier run would not fit the report
        if failures:
            sheet = contact_sheet([(read_picture(files[j.index]), j.prompt, j.reason) for j in failures])
            save_png(sheet, folder / "failures.png")
        print(report.table())
        return report

    def _validate(self, folder: Path) -> Validation:
        from dcar_fast.evaluation.shapes_validation import validate

        validation = validate(self.count, self.seed, self.size)
        print(validation.table())
        _write(folder / "validation.json", validation.to_dict())
        return validation


@dataclass(frozen=True, kw_only=True)
class FidEvaluation(_Evaluation):
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
        network = _inception(self.inception, self.resize, _device(self.device), "FID")
        folders = [PictureFolder(path, self.size or None, self.batch_size) for path in (self.real, self.generated)]
        found = fid(*folders, network)
        found |= {"resize": self.resize, "left_out": [str(file) for folder in folders for file in folder.skipped]}
        print(f"FID {found['fid']:.3f} ({found['generated_pictures']} pictures, {found['real_pictures']} real ones)")
        if min(found["generated_pictures"], found["real_pictures"]) < FEW:
            print(f"FID of fewer than {FEW} pictures is far too high")
        _write(self.output, found)
        return found


@dataclass(frozen=True, kw_only=True)
class _PromptFileEvaluation(_WithModel):
    prompts: Path
    """The benchmark's own file of prompts."""
    output: Path
    """Folder to write; run again, it draws what is missing."""
    seed: int = 0
    """Of the first image; every further one has the next."""
    limit: int | None = None
    """Only the first so many prompts, to try it out."""
    batch_size: int = 8
    """Prompts sampled together."""
    height: int | None = None
    """Pixels, a multiple of the compression; by default the model's own size."""
    width: int | None = None
    """The same for the width."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        self._check_model()
        self._check_paths("prompts", "output")
        self._check_numbers("batch_size", *(["limit"] if self.limit is not None else []))

    def _options(self, rank: Rank) -> dict[str, Any]:
        names = ("seed", "batch_size", "height", "width")
        return {**{name: getattr(self, name) for name in names}, "rank": rank, **asdict(self.sampling)}


@dataclass(frozen=True, kw_only=True)
class MjhqImages(_PromptFileEvaluation):
    """Draw an image for every prompt of MJHQ-30K's meta_data.json: OUTPUT/<category>/<id>.png, for clean-fid."""

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.prompt_files import draw_mjhq, read_mjhq

        prompts, rank = read_mjhq(self.prompts)[: self.limit], Rank.from_environment()
        check_folder(self.output)
        for report in draw_mjhq(self.pipeline(rank), prompts, self.output, **self._options(rank)):
            print(report)


@dataclass(frozen=True, kw_only=True)
class GenevalImages(_PromptFileEvaluation):
    """Draw images for GenEval's evaluation_metadata.jsonl in the layout that its evaluate_images.py reads."""

    samples: int = 4
    """Images for each prompt; GenEval's figures are for 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("samples")

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.prompt_files import draw_geneval, read_geneval

        rows, rank = read_geneval(self.prompts)[: self.limit], Rank.from_environment()
        check_folder(self.output)
        print(draw_geneval(self.pipeline(rank), rows, self.output, self.samples, **self._options(rank)))


def _device(name: str, rank: Rank | None = None):
    import torch

    from dcar_fast._inputs import check_device
    from dcar_fast.bulk.ranks import Rank

    device = check_device((rank or Rank()).device(name, torch.cuda.is_available()))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for the current GPU shall not wake another one
    return device


def _inception(path: str, resize: str, device, metric: str) -> Inception | None:
    if not path:
        print(f"{metric} is left out: it needs the weights of Inception from a local file, inception is not set")
        return None
    from dcar_fast.evaluation.inception import load_inception

    return load_inception(path, resize).to(device)


def _write(path: Path | None, values: dict[str, Any]) -> None:
    from dcar_fast._files import write_atomically

    if path is not None:
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
