"""Commands that draw pictures or send them through the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dcar_fast._model_choice import ModelChoice
from dcar_fast._sampling_options import SamplingOptions, given
from dcar_fast.cli.common import Output, interrupted_by_sigterm

Sampling = Annotated[SamplingOptions, arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Sample(ModelChoice):
    """Draw one image per prompt."""

    prompts: Positional[tuple[str, ...]]
    """What to draw; several prompts give NAME-0.png, NAME-1.png, ..."""
    output: Output = Path("sample.png")
    """PNG to write."""
    seed: int | None = None
    """Image b uses seed + b; drawn at random if left out, and written into the PNG."""
    height: int | None = None
    """Pixels, a multiple of the compression; by default the model's own size."""
    width: int | None = None
    """The same for the width."""
    batch_size: int = 8
    """Prompts sampled together."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def run(self) -> None:
        paths = _outputs(self.output, len(self.prompts))
        pipeline = self.pipeline()
        images = pipeline(
            list(self.prompts),
            seed=self.seed,
            height=self.height,
            width=self.width,
            batch_size=self.batch_size,
            **given(self.sampling),
        )
        _save(images, paths)


@dataclass(frozen=True, kw_only=True)
class Generate(ModelChoice):
    """Draw one PNG for each prompt of a file; run again, it draws what is missing.

    On several GPUs: torchrun --nproc-per-node N -m dcar_fast generate ...
    """

    prompts: Positional[Path]
    """Text file with one prompt per line, or .jsonl: objects with "prompt", and "seed" and "name" if wanted."""
    output: Output
    """Folder to write: 00000.png, ... in the order of the prompts, and metadata.jsonl when all are there."""
    seed: int = 0
    """The image of line i uses seed + i."""
    height: int | None = None
    """Pixels, a multiple of the compression; by default the model's own size."""
    width: int | None = None
    """The same for the width."""
    batch_size: int = 8
    """Prompts sampled together; those of about equal length are."""
    overwrite: bool = False
    """Draw everything anew, whatever is in the folder."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.jobs import read_jobs
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.bulk.run import check_batch_size

        jobs, rank = read_jobs(self.prompts, self.seed), Rank.from_environment()
        check_batch_size(self.batch_size)
        check_folder(self.output)
        with interrupted_by_sigterm():
            report = self.pipeline(rank).generate_to(
                self.output,
                [job.prompt for job in jobs],
                seed=[job.seed for job in jobs],
                names=[job.file_name for job in jobs],
                height=self.height,
                width=self.width,
                batch_size=self.batch_size,
                overwrite=self.overwrite,
                rank=rank,
                **given(self.sampling),
            )
        print(report)


@dataclass(frozen=True, kw_only=True)
class Reconstruct(ModelChoice):
    """Send an image through the tokenizer and back."""

    image: Positional[Path]
    """Image to read."""
    output: Output = Path("reconstruction.png")
    mode: Literal["hybrid", "discrete"] = "hybrid"
    """With the residuals, or from the codes alone."""
    pad: bool = False
    """Repeat the edges up to the next multiple of the compression, and cut them off again."""

    def run(self) -> None:
        image, paths = _open(self.image), _outputs(self.output, 1)
        _save([self.pipeline().reconstruct(image, self.mode, pad=self.pad)], paths)


@dataclass(frozen=True, kw_only=True)
class Inpaint(ModelChoice):
    """Repaint the white part of a mask after a prompt."""

    image: Positional[Path]
    """Image to read."""
    mask: Positional[Path]
    """Mask of the same size, white where the image is repainted."""
    prompt: Positional[str]
    """What to draw there."""
    output: Output = Path("inpainted.png")
    seed: int | None = None
    pad: bool = False
    """Repeat the edges up to the next multiple of the compression, and cut them off again."""
    paste: bool = False
    """Put the original pixels back outside the mask."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def run(self) -> None:
        image, mask, paths = _open(self.image), _open(self.mask), _outputs(self.output, 1)
        options = {"seed": self.seed, "pad": self.pad, "paste": self.paste, **given(self.sampling)}
        _save([self.pipeline().inpaint(image, mask, self.prompt, **options)], paths)


@dataclass(frozen=True, kw_only=True)
class Variation(ModelChoice):
    """Sample a share of an image's tokens anew."""

    image: Positional[Path]
    """Image to read."""
    prompt: Positional[str]
    """What the image shows."""
    output: Output = Path("variation.png")
    strength: float = 0.5
    """Share of the tokens, 0..1."""
    seed: int | None = None
    pad: bool = False
    """Repeat the edges up to the next multiple of the compression, and cut them off again."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def run(self) -> None:
        image, paths = _open(self.image), _outputs(self.output, 1)
        options = {"seed": self.seed, "pad": self.pad, **given(self.sampling)}
        _save([self.pipeline().variation(image, self.prompt, self.strength, **options)], paths)


def _open(path: Path):
    from dcar_fast.images import open_image

    return open_image(path)


def _outputs(output: Path, count: int) -> list[Path]:
    """The PNG files to write, checked to be writable before any work is done."""
    from dcar_fast._files import check_writable

    if count < 1:
        raise ValueError("prompts must hold at least one string, got an empty list")
    if output.suffix.lower() != ".png":
        raise ValueError(f"output must end in .png (the settings are stored in it), got {str(output)!r}")
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    for path in paths:
        check_writable(path)
    return paths


def _save(images, paths: list[Path]) -> None:
    from dcar_fast.images import save_png

    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
        print(f"wrote {path}")
