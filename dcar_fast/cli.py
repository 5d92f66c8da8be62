"""The command line ``dcar-fast``: one dataclass per command, flags made from its fields by tyro."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from dcar_fast.config import PRESETS, SamplingConfig

DESCRIPTION = "DC-AR text-to-image: sample, generate, reconstruct, inpaint, convert; compile and tune the kernels."

Output = Annotated[Path, arg(aliases=["-o"])]
Sampling = Annotated[SamplingConfig, arg(name="")]


@dataclass(kw_only=True)
class _ModelCommand:
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


@dataclass(kw_only=True)
class Sample(_ModelCommand):
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
    sampling: Sampling = field(default_factory=SamplingConfig)

    def run(self) -> None:
        paths = _outputs(self.output, len(self.prompts))
        pipeline = self.pipeline()
        images = pipeline(
            list(self.prompts),
            seed=self.seed,
            height=self.height,
            width=self.width,
            batch_size=self.batch_size,
            **asdict(self.sampling),
        )
        _save(images, paths)


@dataclass(kw_only=True)
class Generate(_ModelCommand):
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
    sampling: Sampling = field(default_factory=SamplingConfig)

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.jobs import read_jobs
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.bulk.run import check_batch_size

        jobs, rank = read_jobs(self.prompts, self.seed), Rank.from_environment()
        check_batch_size(self.batch_size)
        check_folder(self.output)
        with _interrupted_by_sigterm():
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
                **asdict(self.sampling),
            )
        print(report)


@dataclass(kw_only=True)
class Reconstruct(_ModelCommand):
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


@dataclass(kw_only=True)
class Inpaint(_ModelCommand):
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
    sampling: Sampling = field(default_factory=SamplingConfig)

    def run(self) -> None:
        image, mask, paths = _open(self.image), _open(self.mask), _outputs(self.output, 1)
        options = {"seed": self.seed, "pad": self.pad, "paste": self.paste, **asdict(self.sampling)}
        _save([self.pipeline().inpaint(image, mask, self.prompt, **options)], paths)


@dataclass(kw_only=True)
class Variation(_ModelCommand):
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
    sampling: Sampling = field(default_factory=SamplingConfig)

    def run(self) -> None:
        image, paths = _open(self.image), _outputs(self.output, 1)
        options = {"seed": self.seed, "pad": self.pad, **asdict(self.sampling)}
        _save([self.pipeline().variation(image, self.prompt, self.strength, **options)], paths)


@dataclass(kw_only=True)
class Convert:
    """Turn the released checkpoints into one of our folders (config.json and safetensors)."""

    generator: Path
    """pytorch_model.bin of the released generator, or a folder with it."""
    tokenizer: Path
    """Folder of the released DC-HT tokenizer."""
    output: Output
    """Folder to write."""
    text_encoder: str = "google-t5/t5-base"
    """Folder or hub id of the T5 encoder."""
    generator_config: Path | None = None
    """JSON with the fields of DCARConfig; inferred from the released shapes if left out."""
    tokenizer_config: Path | None = None
    """JSON with the fields of DCHTConfig; inferred from the released shapes if left out."""

    def run(self) -> None:
        from dcar_fast._files import check_writable
        from dcar_fast.checkpoints import read_json
        from dcar_fast.config import DCARConfig, DCHTConfig
        from dcar_fast.pipeline import DCARPipeline

        if self.output.is_file():
            raise ValueError(f"{self.output} is a file, the output is a folder")
        check_writable(self.output / "config.json")
        configs = {}
        for name, kind, path in (
            ("generator_config", DCARConfig, self.generator_config),
            ("tokenizer_config", DCHTConfig, self.tokenizer_config),
        ):
            configs[name] = None if path is None else kind.from_dict(read_json(path))
        pipeline = DCARPipeline.from_official(self.generator, self.tokenizer, self.text_encoder, **configs)
        pipeline.save_pretrained(self.output)
        print(f"wrote {self.output}")


@dataclass(kw_only=True)
class Doctor:
    """Print what is installed, and for every op and backend whether it will be used here and why not."""

    device: str = "auto"

    def run(self) -> None:
        from dcar_fast.doctor import report

        print(report(self.device))


@dataclass(kw_only=True)
class _KernelCommand:
    """What the commands on Triton kernels take; they need a GPU."""

    device: str = "auto"
    """Such as cuda:1; "auto" takes the current GPU."""
    match: str = ""
    """Only kernels, dtypes and shapes that contain this text, such as "vq_lookup" or "bf16"."""
    jobs: int | None = None
    """Processes that compile; by default one for each core, up to eight."""


@dataclass(kw_only=True)
class Warmup(_KernelCommand):
    """Compile every kernel for the full-size shapes, so that no first call waits for it."""

    def run(self) -> None:
        from dcar_fast.tuning import JOBS, run_warmup

        run_warmup(self.device, self.match, JOBS if self.jobs is None else self.jobs)


@dataclass(kw_only=True)
class Tune(_KernelCommand):
    """Time every kernel's candidate tiles on this GPU and keep the fastest for later runs."""

    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """JSON file to write or extend; by default this GPU's in the user's cache, from where it is used."""
    minutes: float = float("inf")
    """Begin nothing new after that long."""

    def run(self) -> None:
        from dcar_fast.tuning import JOBS, run_tune

        run_tune(self.device, self.match, self.output, self.minutes, JOBS if self.jobs is None else self.jobs)


@dataclass(kw_only=True)
class Bench:
    """Compile or tune the Triton kernels on a GPU."""

    command: Annotated[
        Union[Annotated[Warmup, subcommand("warmup")], Annotated[Tune, subcommand("tune")]],  # noqa: UP007 - as below
        arg(name=""),
    ]

    def run(self) -> None:
        self.command.run()


Command = Union[  # noqa: UP007 - tyro takes the annotated alternatives from it
    Annotated[Sample, subcommand("sample")],
    Annotated[Generate, subcommand("generate")],
    Annotated[Reconstruct, subcommand("reconstruct")],
    Annotated[Inpaint, subcommand("inpaint")],
    Annotated[Variation, subcommand("variation")],
    Annotated[Convert, subcommand("convert")],
    Annotated[Doctor, subcommand("doctor")],
    Annotated[Bench, subcommand("bench")],
]


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of ``dcar-fast``; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        tyro.cli(Command, prog="dcar-fast", description=DESCRIPTION, args=args).run()
    except ValueError as error:
        print(f"dcar-fast: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"dcar-fast: error: out of memory: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"dcar-fast: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dcar-fast: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which torchrun sends, ends the work as Ctrl-C does: files are finished and temporary ones removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


if __name__ == "__main__":
    sys.exit(main())
