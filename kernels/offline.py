"""Compiles Triton kernels for GPUs that are not there, and reads what the machine code needs.

    python -m dcar_fast.kernels.offline [--targets 80 90] [--match TEXT] [--all]

prints a table of every shipped variant; ``--all`` adds every tuning candidate and sm_120. A kernel module lists its
variants in ``offline_variants(capability, every)``. Neither a GPU nor a driver is needed: ptxas and cuobjdump come with
Triton.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcar_fast.kernels.configs import SHARED_LIMIT, Config

TARGETS = (80, 89, 90, 100)
EVERY_TARGET = (*TARGETS, 120)
NO_KERNELS = {"configs", "offline", "philox"}  # modules of this folder that hold no op


@dataclass(frozen=True)
class Variant:
    """One way a kernel is launched.

    ``name``: the kernel's, its op first ("vq_lookup.scan"). ``signature``: Triton types of the arguments that are no
    constants; pointers are taken as aligned to 16 bytes, as torch's are, and so are the integers in
    ``multiples_of_16``. ``tensor_cores``: whether the machine code must have matrix instructions.
    """

    name: str
    dtype: str
    shape: str
    config: Config
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = ()
    tensor_cores: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype} {self.shape} {self.config}"


class Resources(NamedTuple):
    """What one compiled variant takes: registers and stack bytes per thread, shared bytes per block, the number of
    machine instructions that spill (STL, LDL), and how many there are of each matrix instruction (HMMA, HGMMA,
    UTCHMMA, ...)."""

    registers: int
    stack: int
    shared: int
    spills: int
    mma: dict[str, int]


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles for ``capability`` (80, 89, 90, 100, ...). RuntimeError if the machine code cannot be read."""
    signature = {name: variant.signature.get(name, "constexpr") for name in variant.kernel.arg_names}
    constexprs = {**variant.constexprs, **variant.config.blocks}
    aligned = [
        (position,)
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in variant.multiples_of_16
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.config.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = cuobjdump("-res-usage", cubin), cuobjdump("-sass", cubin)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    found = instructions(sass)
    if used is None or not found:
        raise RuntimeError(
            f"{variant.label}, sm_{capability}: cuobjdump printed neither usage nor code:\n{usage}\n{sass}"
        )
    return Resources(
        registers=int(used[1]),
        stack=int(used[2]),
        shared=compiled.metadata.shared,
        spills=found["STL"] + found["LDL"],
        mma={name: count for name, count in sorted(found.items()) if "MMA" in name},
    )


def instructions(sass: str) -> Counter[str]:
    """How often each machine instruction stands in a listing of ``cuobjdump -sass``."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE))


def cuobjdump(option: str, path: Path) -> str:
    """What the cuobjdump that comes with Triton prints of a file of machine code."""
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_names() -> list[str]:
    """The ops that have a Triton kernel: the modules of this folder."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(stem for stem in stems - NO_KERNELS if not stem.startswith("_"))


def variants(capability: int, every: bool = False, ops: Iterable[str] | None = None) -> list[Variant]:
    """What the kernels of ``ops`` (default: all) ship for ``capability``, or everything they could be tuned to."""
    modules = [importlib.import_module(f"dcar_fast.kernels.{op}") for op in (ops or kernel_names())]
    return [variant for module in modules for variant in module.offline_variants(capability, every)]


def compile_all(
    targets: Iterable[int] = TARGETS, every: bool = False, ops: Iterable[str] | None = None, match: str = ""
) -> Iterator[tuple[int, Variant, Resources]]:
    """(target, variant, resources) of all variants whose label contains ``match``, compiled on every core, in order."""
    jobs = [
        (target, op, number, variant)
        for target in targets
        for op in (ops or kernel_names())
        for number, variant in enumerate(variants(target, every, [op]))
        if match in variant.label
    ]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1) or 1, context) as pool:
        done = pool.map(_compile_job, [(target, op, number, every) for target, op, number, _ in jobs])
        for (target, _, _, variant), resources in zip(jobs, done, strict=True):
            yield target, variant, resources


def _compile_job(job: tuple[int, str, int, bool]) -> Resources:
    """Variants hold functions, which do not travel between processes: they are named by op and number instead."""
    target, op, number, every = job
    return compile_variant(variants(target, every, [op])[number], target)


def print_table(results: Iterable[tuple[int, Variant, Resources]]) -> None:
    print(f"{'variant':<72}{'sm':>5}{'registers':>11}{'stack':>7}{'shared':>8}{'spills':>8}  matrix instructions")
    for target, variant, got in results:
        over = "" if got.shared <= SHARED_LIMIT[target] else f" > {SHARED_LIMIT[target]}!"
        mma = " ".join(f"{name} {count}" for name, count in got.mma.items()) + over
        print(
            f"{variant.label:<72}{target:>5}{got.registers:>11}{got.stack:>7}{got.shared:>8}{got.spills:>8}  {mma}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the Triton kernels need, per GPU generation.")
    parser.add_argument("--targets", type=int, nargs="+", help="compute capabilities, such as 80 90")
    parser.add_argument("--match", default="", help="only variants whose label contains this")
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--all", action="store_true", help="also every tuning candidate, and sm_120")
    arguments = parser.parse_args()
    targets = arguments.targets or (EVERY_TARGET if arguments.all else TARGETS)
    print_table(compile_all(targets, arguments.all, arguments.ops, arguments.match))


if __name__ == "__main__":
    main()
