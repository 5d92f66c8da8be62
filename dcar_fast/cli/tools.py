"""Commands around the models: conversion of checkpoints, a report on this machine, the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

from tyro.conf import arg, subcommand

from dcar_fast.cli.common import Output


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
