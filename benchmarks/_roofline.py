"""Ceilings, stages and units of roofline.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcar_fast import flops

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
LABELS = {
    "text": "text encoder",
    "text_projection": "text keys, values",
    "trunk": "trunk",
    "logits": "logits",
    "head": "diffusion head",
    "decode": "decoder",
}
FLOP_UNITS = ((1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"))
BYTE_UNITS = ((1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
SECOND_UNITS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"))
COLOURS = dict(zip(LABELS, ("#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True))


@dataclass(frozen=True)
class Ceiling:
    """A rate per second and where it comes from: "measured", "datasheet" or "given"."""

    rate: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU: dense 16-bit and float32 (without TF32) FLOP/s, memory bytes/s.

    Measured: a large bfloat16 product of random matrices, and a device-to-device copy counting reads and writes.
    """

    name: str
    half: Ceiling
    single: Ceiling
    memory: Ceiling


GPUS = {
    "h200": Gpu("H200", Ceiling(790e12, "measured"), Ceiling(67e12, "datasheet"), Ceiling(4.3e12, "measured")),
    "h100": Gpu("H100 SXM", Ceiling(798e12, "measured"), Ceiling(67e12, "datasheet"), Ceiling(3.0e12, "measured")),
    "a100": Gpu("A100 SXM", Ceiling(312e12, "datasheet"), Ceiling(19.5e12, "datasheet"), Ceiling(2.0e12, "datasheet")),
}


@dataclass(frozen=True)
class Stage:
    """Sums of one stage: FLOPs, bytes, floor in seconds, and the part of the floor that is bound by memory."""

    name: str
    flops: int
    bytes: int
    floor: float
    memory_bound: float


def summarise(name: str, ops: list[flops.Op], size: int, compute: float, memory: float) -> Stage:
    total = flops.floor(ops, size, compute, memory)
    bound = [op for op in ops if op.flops / compute < (op.weights + op.activations) * size / memory]
    return Stage(name, flops.flops(ops), flops.moved(ops, size), total, flops.floor(bound, size, compute, memory))


def unit_of(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The (factor, name) among ``units`` (ascending) in which ``largest`` is at least 1, or the first."""
    return next(((f, name) for f, name in reversed(units) if largest >= f), units[0])


def quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, name = unit_of(value, units)
    return f"{value / factor:.3g} {name}"


@dataclass(frozen=True)
class Measured:
    """A row of a benchmark. seconds: of the whole batch. lanes: stage of ``LABELS`` -> seconds and what they include
    ("" for the stage itself); they come from runs with a stop after every stage."""

    source: str
    seconds: float
    lanes: dict[str, tuple[float, str]]

    @classmethod
    def of(cls, result: dict[str, Any], row: dict[str, Any]) -> Measured:
        """A result and one of its rows; the unmasking steps are keys, values, trunk and logits together."""
        found = {stage: seconds for stage, seconds in row["stages"].items() if seconds}
        lanes = {name: (found[name], "") for name in ("text", "head", "decode") if name in found}
        if "unmask" in found:
            lanes["trunk"] = found["unmask"], "keys, trunk, logits"
        source = f"{row['name']} on {result['device']}, {result['time'][:10]}"
        return cls(source, row["median_s"], lanes)
