"""Compiles Triton kernels for GPUs that are not there, and reads what the machine code needs.

    python -m dcar_fast.kernels.offline [--targets 80 90] [--match TEXT]

prints a table of every shipped variant. A kernel module lists its variants in ``offline_variants()`` and is named in
``KERNELS``. Neither a GPU nor a driver is needed: ptxas and cuobjdump come with Triton.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = ("add_residual",)

# bytes of shared memory that a thread block can have, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); Triton does not check it without the device
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TARGETS = (80, 89, 90, 100)


class Variant(NamedTuple):
    """One way a kernel is launched. ``signature``: Triton types of the arguments that are no constants; pointers are
    taken as aligned to 16 bytes, as torch's are, and so are the integers named in ``multiples_of_16``."""

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    multiples_of_16: tuple[str, ...] = ()


class Resources(NamedTuple):
    """What one compiled variant takes: registers and stack bytes per thread, shared bytes per block, and the number of
    machine instructions that spill (STL, LDL) and that are matrix products (HMMA, HGMMA, UTC*MMA, ...)."""

    registers: int
    stack: int
    shared: int
    spills: int
    matrix: int


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles for ``capability`` (80, 89, 90, 100, ...). RuntimeError if the machine code cannot be read."""
    signature = {name: variant.signature.get(name, "constexpr") for name in variant.kernel.arg_names}
    aligned = [
        (position,)
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in variant.multiples_of_16
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=dict(variant.constexprs),
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE)
    if used is None or not instructions:
        raise RuntimeError(
            f"{variant.label}, sm_{capability}: cuobjdump printed neither usage nor code:\n{usage}\n{sass}"
        )
    return Resources(
        registers=int(used[1]),
        stack=int(used[2]),
        shared=compiled.metadata.shared,
        spills=sum(name in ("STL", "LDL") for name in instructions),
        matrix=sum("MMA" in name for name in instructions),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def all_variants() -> list[Variant]:
    """The variants of every module in ``KERNELS``."""
    modules = [importlib.import_module(f"dcar_fast.kernels.{name}") for name in KERNELS]
    return [variant for module in modules for variant in module.offline_variants()]


def print_table(variants: Iterable[Variant], targets: Iterable[int]) -> None:
    print(f"{'variant':<44}{'sm':>5}{'registers':>11}{'stack':>7}{'shared':>8}{'spills':>8}{'matrix':>8}")
    for variant in variants:
        for target in targets:
            got = compile_variant(variant, target)
            print(
                f"{variant.label:<44}{target:>5}{got.registers:>11}{got.stack:>7}{got.shared:>8}{got.spills:>8}{got.matrix:>8}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the shipped Triton kernels need, per GPU generation.")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities, such as 80 90")
    parser.add_argument("--match", default="", help="only variants whose label contains this")
    arguments = parser.parse_args()
    print_table([v for v in all_variants() if arguments.match in v.label], arguments.targets)


if __name__ == "__main__":
    main()
