"""Tiles, warps and stages of the Triton kernels: one table per kernel, shared by launcher, tuner and offline compiler.

A kernel module holds a :class:`Table` with shipped rules for data-centre and consumer GPUs. What ``dcar-fast bench
tune`` measured on a GPU comes before them: a file named after the GPU, in the user's cache or in ``kernels/tuned/``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# bytes of shared memory that a thread block can have, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); Triton does not check it without the device
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
CONSUMER_LIMIT = 101_376
INTERPRETED = 90  # tensors on the CPU: Triton's interpreter, which has no capability of its own
SHIPPED = Path(__file__).with_name("tuned")

logger = logging.getLogger(__name__)


class Config(NamedTuple):
    """How a kernel is launched: its ``tl.constexpr`` tile sizes, warps per block and pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, **self.options}

    def __str__(self) -> str:
        return "x".join(map(str, self.blocks.values())) + f" w{self.num_warps} s{self.num_stages}"


class Rule(NamedTuple):
    """``config`` serves sizes that are at most ``limits``; a size without a limit may be anything."""

    limits: Mapping[str, int]
    config: Config


class Case(NamedTuple):
    """One launch that users meet. ``prepare(device)`` makes its inputs and returns the launch, which takes a config or
    None for the table's own. ``label`` names dtype and shape; ``sizes`` are what the table is asked for;
    ``least`` is the compute capability that it needs."""

    label: str
    table: Table
    sizes: Mapping[str, int]
    prepare: Callable[[torch.device], Callable[[Config | None], object]]
    least: int = 80


@dataclass(frozen=True, eq=False)
class Table:
    """The configurations of one kernel.

    ``name``: "op" or "op.part". ``shipped``: rules by GPU class, "datacenter" and "consumer", or for one capability,
    such as "sm_80"; the first rule that fits is taken, so the last one has no limits. ``candidates``: what the tuner
    tries. ``scaling``: sizes whose tuned configurations are shared up to the next power of two; others must be equal.
    """

    name: str
    shipped: Mapping[str, tuple[Rule, ...]]
    candidates: tuple[Config, ...]
    scaling: tuple[str, ...] = ()
    _picked: dict[tuple, Config] = field(default_factory=dict, repr=False)

    def pick(self, device: torch.device, **sizes: int) -> Config:
        """The configuration for a launch on ``device``: tuned on this GPU if it was, else shipped."""
        key = (device.type, device.index, *sizes.items())
        config = self._picked.get(key)
        if config is None:
            shipped = self.ship(capability(device), **sizes)
            config = tuned(gpu_name(device)).get(self.name, {}).get(self.bucket(sizes), shipped)
            if config.blocks.keys() != shipped.blocks.keys():  # tuned with another version of the kernel
                logger.warning(
                    "%s: the tuned configuration %s is ignored, its tiles are not %s; tune again",
                    self.name,
                    dict(config.blocks),
                    ", ".join(shipped.blocks),
                )
                config = shipped
            self._picked[key] = config
        return config

    def ship(self, capability: int, **sizes: int) -> Config:
        """The shipped configuration for a compute capability, such as 90."""
        rules = self.shipped.get(f"sm_{capability}") or self.shipped[gpu_class(capability)]
        return next(rule.config for rule in rules if all(sizes[name] <= most for name, most in rule.limits.items()))

    def configs(self, capability: int, every: bool, **sizes: int) -> list[Config]:
        """What the offline compiler builds: the shipped configuration, or with ``every`` each candidate as well."""
        shipped = self.ship(capability, **sizes)
        return [shipped, *(c for c in self.candidates if c != shipped)] if every else [shipped]

    def bucket(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """The key under which tuned configurations are kept."""
        return tuple(
            sorted((k, 1 << max(v - 1, 0).bit_length() if k in self.scaling else int(v)) for k, v in sizes.items())
        )


def gpu_class(capability: int) -> str:
    """ "consumer" for GPUs whose blocks get 99 KiB of shared memory, unknown ones included, else "datacenter"."""
    return "datacenter" if SHARED_LIMIT.get(capability, 0) > CONSUMER_LIMIT else "consumer"


@cache
def capability(device: torch.device) -> int:
    """90 for sm_90; the interpreter's stand-in for tensors on the CPU."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def gpu_name(device: torch.device) -> str:
    """ "nvidia-h200" for a GPU of that name, "cpu" otherwise: the stem of its file of tuned configurations."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_folder() -> Path:
    """Where ``dcar-fast bench tune`` writes: ``$XDG_CACHE_HOME/dcar_fast/tuned``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dcar_fast", "tuned")


@cache
def tuned(gpu: str) -> dict[str, dict[tuple, Config]]:
    """Tuned configurations by table name and bucket; the user's own come before those that ship."""
    found: dict[str, dict[tuple, Config]] = {}
    for folder in (SHIPPED, cache_folder()):
        path = folder / f"{gpu}.json"
        if path.exists():
            for name, entries in read(path).items():
                found.setdefault(name, {}).update(entries)
    return found


def read(path: Path) -> dict[str, dict[tuple, Config]]:
    """A file of tuned configurations; keys that it has beyond these are left to their writer. ValueError with its name
    for what is none."""
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        return {
            name: {
                _sizes(entry["sizes"]): Config(
                    {key: _integer(key, value, 0) for key, value in entry["blocks"].items()},
                    *(_integer(key, entry[key], 1) for key in ("num_warps", "num_stages")),
                )
                for entry in entries
            }
            for name, entries in tables.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of tuned configurations ({type(error).__name__}: {error}); delete it, dcar-fast bench "
            "tune writes a new one"
        ) from error


def _sizes(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, _integer(name, value, 0)) for name, value in sizes.items()))


def _integer(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, no integer of at least {least}")
    return value


def entries(tables: Mapping[str, Mapping[tuple, Config]]) -> dict[str, list[dict[str, Any]]]:
    """The value of "tables" in such a file; the inverse of :func:`read`."""
    return {
        name: [
            {"sizes": dict(bucket), "blocks": dict(config.blocks), **config.options}
            for bucket, config in sorted(buckets.items())
        ]
        for name, buckets in sorted(tables.items())
    }


def forget() -> None:
    """Drops what was read of tuned files, after one was written. Tables keep what they picked in this process."""
    tuned.cache_clear()
