"""Precompiles the Triton kernels, and finds their fastest configurations on the GPU at hand.

``dcar-fast bench warmup`` launches every case of every kernel once, so that what Triton compiles is in its cache on
disk. ``dcar-fast bench tune`` times the candidates of each kernel's table and writes the winners to the file that
``kernels/configs.py`` reads before the shipped rules.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dcar_fast import __version__
from dcar_fast._files import check_writable, write_atomically
from dcar_fast._inputs import check_device
from dcar_fast.kernels import configs
from dcar_fast.kernels.configs import Case, Config, Table
from dcar_fast.ops._dispatch import current, triton_usable
from dcar_fast.timing import event_timer

MARGIN = 0.02  # share of the time that a candidate must save, and may lose in no case, to replace what ships
JOBS = min(8, os.cpu_count() or 1)  # processes that compile; each takes some GPU memory as well
# Allowed |difference| / (|value| + root mean square) between two tilings, which add the same numbers in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
TOLERANCE[torch.float8_e4m3fn] = 0.13
# What Triton raises, by name, for a configuration that this GPU has no room for.
DOES_NOT_FIT = {"OutOfResources", "PTXASError", "CompileTimeAssertionFailure"}

Calls = Mapping[int, Callable[[], object]]
Timer = Callable[[Calls], Mapping[int, list[float]]]
SHIPPED = -1  # key of the shipped configuration among the candidates' numbers


class Named(NamedTuple):
    """A case and the op it belongs to."""

    op: str
    case: Case

    def __str__(self) -> str:
        return f"{self.case.table.name} {self.case.label}"


class Warm(NamedTuple):
    """What it took to launch a case for the first time; ``failure``: why it could not be launched."""

    name: str
    seconds: float
    compiled: int
    cached: int
    failure: str | None = None


@dataclass
class Choice:
    """The outcome for the cases that share a table and bucket. ``config``: the winner, None where the shipped rules win
    with different configurations for different cases. ``times_us``: medians by case, shipped and winner. ``skipped``:
    how many candidates do not fit or differ in their result. ``failure``: why nothing was chosen."""

    table: Table
    sizes: dict[str, int]
    config: Config | None = None
    tuned: bool = False
    times_us: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    failure: str | None = None

    def __str__(self) -> str:
        name = f"{self.table.name} {self.sizes}"
        if self.failure:
            return f"{name}: {self.failure}"
        times = "; ".join(f"{label} {t['shipped']:.1f} -> {t['tuned']:.1f} us" for label, t in self.times_us.items())
        left_out = "".join(f", {count} {why}" for why, count in sorted(self.skipped.items()))
        return f"{name}: {self.config if self.tuned else 'as shipped'} ({times}{left_out})"


def gpu(device: str = "auto") -> torch.device:
    """The CUDA device that kernels are tuned on; ValueError with the reason where Triton kernels cannot run."""
    if device == "auto":
        if not torch.cuda.is_available():
            raise ValueError(f"kernels are compiled and tuned on a GPU, and torch {torch.__version__} sees none here")
        device = "cuda"
    target = check_device(device)
    usable = triton_usable(target)
    if not usable.ok:
        raise ValueError(f"kernels are compiled and tuned on a GPU, not on {target}: {usable.reason}")
    return torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)


def all_cases(match: str = "") -> list[Named]:
    """The cases of all kernels whose "table label" contains ``match``; ValueError if there is none."""
    from dcar_fast.kernels.offline import kernel_names  # imports triton

    found = []
    for op in kernel_names():
        for case in importlib.import_module(f"dcar_fast.kernels.{op}").cases():
            named = Named(op, case)
            if match in str(named):
                found.append(named)
    if not found:
        raise ValueError(f"no kernel has a case that contains {match!r}")
    return found


def runnable(cases: list[Named], device: torch.device) -> list[int]:
    """The numbers of the cases that ``device`` has the instructions for."""
    capability = configs.capability(device)
    return [number for number, named in enumerate(cases) if named.case.least <= capability]


# Warm-up


def warmup(
    cases: Iterable[Named],
    device: torch.device,
    *,
    watch: Callable[[], AbstractContextManager[list[bool]]],
    wait: Callable[[], object],
    config: Config | None = None,
) -> Iterator[Warm]:
    """Launches each case once, with the table's own configuration unless ``config`` is given. ``watch`` collects, for
    each kernel that becomes ready, whether it came from the cache (``kernels/_watch.py``); ``wait`` returns when the
    device is done."""
    for named in cases:
        launch = named.case.prepare(device)
        wait()
        failure = None
        with watch() as ready:
            start = time.perf_counter()
            try:
                launch(config)
                wait()
            except Exception as error:
                failure = unfit(error, str(named))
            seconds = time.perf_counter() - start
        yield Warm(str(named), seconds, ready.count(False), ready.count(True), failure)


def unfit(error: Exception, what: str) -> str:
    """Why a configuration does not fit the GPU. Other errors go on, as a RuntimeError that says ``what`` failed."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if type(error).__name__ not in DOES_NOT_FIT:
        raise RuntimeError(f"{what} failed: {error}") from error
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Job(NamedTuple):
    """A launch for another process: the case's number among ``all_cases(match)`` and its candidate's, or SHIPPED."""

    device: str
    match: str
    number: int
    candidate: int = SHIPPED


def launch_job(job: Job) -> Warm:
    """Launches once; what that compiles is in the cache on disk from then on, for every process."""
    from dcar_fast.kernels._watch import compilations

    device, named = torch.device(job.device), all_cases(job.match)[job.number]
    config = None if job.candidate == SHIPPED else named.case.table.candidates[job.candidate]
    with current(device):
        wait = partial(torch.cuda.synchronize, device)
        (warm,) = warmup([named], device, watch=compilations, wait=wait, config=config)
    torch.cuda.empty_cache()  # the processes share the GPU
    return warm


@contextmanager
def compilers(jobs: int) -> Iterator[Executor]:
    """Processes for :func:`launch_job`: compiling takes a core each, and far longer than the launch."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))  # CUDA does not survive a fork
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


# Tuning


def tune(
    cases: Iterable[Named],
    device: torch.device,
    timer: Timer,
    ahead: Callable[[list[Named]], object] = lambda group: None,
) -> Iterator[Choice]:
    """The best configuration for each table and bucket among ``cases``, which share it: a candidate replaces what
    ships if it gives the same results, is more than ``MARGIN`` faster in the geometric mean of the cases, and in none
    of them slower by more than that. ``ahead`` is called with the cases that come next, and may compile for them."""
    groups: dict[tuple, list[Named]] = {}
    for named in cases:
        groups.setdefault((named.case.table.name, named.case.table.bucket(named.case.sizes)), []).append(named)
    capability = configs.capability(device)
    for group in groups.values():
        ahead(group)
        yield _tune_group([named.case for named in group], device, capability, timer)


def _tune_group(group: list[Case], device: torch.device, capability: int, timer: Timer) -> Choice:
    table = group[0].table
    rules = [table.ship(capability, **case.sizes) for case in group]
    rule = rules[0] if all(other == rules[0] for other in rules) else None
    choice = Choice(table, dict(table.bucket(group[0].sizes)), config=rule)
    alive = {number: config for number, config in enumerate(table.candidates) if config != rule}
    medians: dict[str, dict[int, float]] = {}
    for case, shipped in zip(group, rules, strict=True):
        launch = case.prepare(device)
        try:
            expected = [tensor.clone() for tensor in tensors(launch(shipped))]
        except Exception as error:
            reason = unfit(error, f"{table.name} {case.label} as shipped, {shipped},")
            choice.failure = f"the shipped configuration {shipped} does not fit: {reason}"
            return choice
        for number, config in list(alive.items()):
            try:
                same = agree(tensors(launch(config)), expected)
            except Exception as error:
                unfit(error, f"{table.name} {case.label} with {config}")
                choice.skipped["do not fit"] += 1
                del alive[number]
            else:
                if not same:
                    choice.skipped["differ from the shipped result"] += 1
                    del alive[number]
        tried = {SHIPPED: shipped, **alive}
        times = timer({number: partial(launch, config) for number, config in tried.items()})
        medians[case.label] = {number: statistics.median(times[number]) for number in tried}
    best = fastest({number: [times[number] / times[SHIPPED] for times in medians.values()] for number in alive})
    if best != SHIPPED:
        choice.tuned, choice.config = True, alive[best]
    choice.times_us = {
        label: {"shipped": 1e6 * times[SHIPPED], "tuned": 1e6 * times[best]} for label, times in medians.items()
    }
    return choice


def fastest(ratios: Mapping[int, list[float]]) -> int:
    """The number whose times, relative to the shipped ones, have the least geometric mean; SHIPPED if none will do."""
    means = {
        number: math.exp(statistics.fmean(map(math.log, ratio)))
        for number, ratio in ratios.items()
        if max(ratio) <= 1 + MARGIN
    }
    best = min(means, key=means.__getitem__, default=SHIPPED)
    return best if best != SHIPPED and means[best] < 1 - MARGIN else SHIPPED


def tensors(result: object) -> list[torch.Tensor]:
    """The tensors of what a launch returns. TypeError if there is none, because then nothing can be compared."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    found = [part for part in parts if isinstance(part, torch.Tensor)]
    if not found:
        raise TypeError(f"a launch returned {type(result).__name__}: a tensor or several are needed to check it")
    return found


def agree(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether two results are equal up to the order of additions; integers, NaN and infinities exactly."""
    return len(got) == len(expected) and all(map(_agree, got, expected))


def _agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    tolerance = TOLERANCE[got.dtype]
    if got.dtype.itemsize == 1:  # which has no arithmetic
        got, expected = got.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=-1.0), expected[~finite].nan_to_num(nan=-1.0)):
        return False
    if not torch.equal(got[~finite].isnan(), expected[~finite].isnan()):
        return False
    got, expected = got[finite].double(), expected[finite].double()
    if not expected.numel():
        return True
    scale = expected.abs() + expected.square().mean().sqrt()
    return bool(((got - expected).abs() <= tolerance * scale).all())


# The file


def merge(path: Path, gpu_name: str, choices: Iterable[Choice]) -> dict[str, Any]:
    """What ``path`` held, with the entries of ``choices`` replaced. ValueError if it held something else."""
    held: dict[str, Any] = {"tables": {}}
    if path.exists():
        configs.read(path)
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.get("gpu", gpu_name) != gpu_name:
            raise ValueError(f"{path} is for {held['gpu']}, this GPU is {gpu_name}")
    held["gpu"] = gpu_name
    for choice in choices:
        if choice.failure:
            continue
        name, bucket = choice.table.name, choice.table.bucket(choice.sizes)
        kept = [entry for entry in held["tables"].get(name, []) if choice.table.bucket(entry["sizes"]) != bucket]
        if choice.config is not None:
            (entry,) = configs.entries({name: {bucket: choice.config}})[name]
            kept.append(entry | {"date": _now(), "versions": _versions(), "times_us": choice.times_us})
        held["tables"][name] = kept
    return held


def write(path: Path, held: Mapping[str, Any]) -> None:
    """Writes the file in one step: an interruption leaves the old one whole."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8"))
    configs.forget()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {"dcar_fast": __version__, "torch": torch.__version__, "triton": version("triton")}


# The commands


def check_jobs(jobs: int) -> None:
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")


def run_warmup(device: str = "auto", match: str = "", jobs: int = JOBS) -> None:
    """``dcar-fast bench warmup`` in ``jobs`` processes: prints a line per case. ValueError without a GPU, or if a
    launch does not fit it."""
    check_jobs(jobs)
    target = gpu(device)
    numbers = runnable(all_cases(match), target)
    done: list[Warm] = []
    print(f"{torch.cuda.get_device_name(target)}: {len(numbers)} launches")
    start = time.perf_counter()
    with compilers(jobs) as pool:
        for warm in pool.map(launch_job, [Job(str(target), match, number) for number in numbers]):
            done.append(warm)
            state = warm.failure or f"{warm.compiled} compiled, {warm.cached} from the cache"
            print(f"{warm.name:<60} {warm.seconds:8.3f} s  {state}", flush=True)
    print(
        f"{sum(w.compiled for w in done)} kernels compiled, {sum(w.cached for w in done)} from the cache, "
        f"{time.perf_counter() - start:.1f} s"
    )
    if failed := [warm.name for warm in done if warm.failure]:
        raise ValueError(f"{len(failed)} of {len(done)} launches do not fit this GPU: {', '.join(failed)}")


def run_tune(
    device: str = "auto", match: str = "", output: Path | None = None, minutes: float = math.inf, jobs: int = JOBS
) -> None:
    """``dcar-fast bench tune``: compiles in ``jobs`` processes, which are idle while it measures; writes after every
    table and bucket, and begins no further one after ``minutes``. ValueError without a GPU, for a file that is none of
    ours, and if a shipped configuration does not fit."""
    check_jobs(jobs)
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    target = gpu(device)
    cases = all_cases(match)
    able = [cases[number] for number in runnable(cases, target)]
    name = configs.gpu_name(target)
    path = output or configs.cache_folder() / f"{name}.json"
    check_writable(path)
    merge(path, name, [])
    print(f"{torch.cuda.get_device_name(target)}: {len(able)} cases, results go to {path}")
    deadline = time.monotonic() + 60 * minutes
    failed, tuned = [], 0
    with current(target), compilers(jobs) as pool:

        def ahead(group: list[Named]) -> None:
            tried = [(cases.index(named), named.case.table.candidates) for named in group]
            todo = [Job(str(target), match, case, number) for case, found in tried for number in range(-1, len(found))]
            list(pool.map(launch_job, todo))

        for choice in tune(able, target, event_timer(target), ahead):
            print(choice, flush=True)
            tuned += choice.tuned
            if choice.failure:
                failed.append(str(choice))
            else:
                write(path, merge(path, name, [choice]))
            if time.monotonic() > deadline:
                print(f"stopped after {minutes:g} minutes; what is done is kept, --match names the rest")
                break
    print(f"{tuned} configurations are faster than what ships")
    if failed:
        raise ValueError(f"{len(failed)} tables were left as they are: {'; '.join(failed)}")
