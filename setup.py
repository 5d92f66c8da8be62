"""Builds dcar_fast: the Python packages, and the native module ``dcar_fast._native`` from csrc/.

The native module includes no torch header, so torch is not needed here and pip's build isolation works. What is built
depends on what the machine has; the reason for leaving something out is printed and kept in the module:

    no C++ compiler, no Python headers,     pure-Python install, with a warning
    not Linux
    no nvcc, or DCAR_FAST_CUDA=0            CPU kernels only
    nvcc                                    CUDA kernels for DCAR_FAST_CUDA_ARCHS (default "80 89 90a 100+PTX", those
                                            of them that this nvcc knows), linked with the toolkit's static runtime

Anything else that goes wrong fails the build. Build-time environment: CXX, CUDA_HOME or CUDA_PATH, DCAR_FAST_CUDA
(0: never, 1: fail without it), DCAR_FAST_CUDA_ARCHS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Nobody looks at errno or at floating-point traps; minding them keeps roots and comparisons out of vector code.
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
CXX_FLAGS += ["-Wall", "-Wextra"]
# Files named <what>_<isa>.cpp; what they compile runs only where cpu_isa.cpp finds the instruction set.
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f"],
    "avx512vnni": ["-mavx512f", "-mavx512vnni"],
}
DEFAULT_CUDA_ARCHS = ("80", "89", "90a", "100")
ARCH = re.compile(r"(?:sm_)?(\d{1,2})\.?(\d)([af]?)(\+ptx)?", re.IGNORECASE)


class Step(NamedTuple):
    """One command of the build: it makes ``output`` from ``inputs``; ``depfile`` will list the headers it read."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


class Cuda(NamedTuple):
    """A toolkit to compile with: ``archs`` such as ["80", "90a", "100+PTX"], ``lib`` holds libcudart_static.a."""

    nvcc: str
    lib: Path
    archs: list[str]


def note(message: str) -> None:
    print(f"dcar_fast: {message}", file=sys.stderr, flush=True)


# What this machine can build


def find_cxx() -> str | None:
    """The C++ compiler: CXX if set, else the first of c++, g++ and clang++. SetupError if CXX names nothing."""
    if chosen := os.environ.get("CXX"):
        if shutil.which(chosen) is None:
            raise SetupError(f"CXX={chosen}: there is no such command")
        return chosen
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def native_obstacle() -> str | None:
    """Why the native module cannot be built on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if find_cxx() is None:
        return "no C++ compiler: CXX is not set, and none of c++, g++ and clang++ is on PATH"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return f"no Python headers: {header} does not exist"
    return None


def pybind11_include() -> str:
    """The folder of pybind11's headers: the pybind11 package's, else the copy inside an installed torch."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # finds the package without importing it
    for folder in (torch and torch.submodule_search_locations) or ():
        if Path(folder, "include", "pybind11", "pybind11.h").exists():
            note("pybind11 is not installed; using the headers that come with torch")
            return str(Path(folder, "include"))
    raise SetupError("pybind11's headers are needed and neither pybind11 nor torch is installed: pip install pybind11")


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for: DCAR_FAST_CUDA_ARCHS, or those of the default that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"sm_(\d+)", listed))
    requested = os.environ.get("DCAR_FAST_CUDA_ARCHS", "").strip()
    if not requested:
        archs = [arch for arch in DEFAULT_CUDA_ARCHS if arch.rstrip("a") in known]
        return archs[:-1] + [archs[-1] + "+PTX"] if archs and archs[-1].isdigit() else archs
    archs = []
    for token in re.split(r"[\s,;]+", requested):
        match = ARCH.fullmatch(token)
        if match is None:
            raise SetupError(
                f"DCAR_FAST_CUDA_ARCHS={requested}: {token!r} is not an architecture; write '80 90a 100+PTX'"
            )
        if match[1] + match[2] not in known:
            raise SetupError(
                f"DCAR_FAST_CUDA_ARCHS={requested}: {nvcc} cannot compile for {token}, only for {listed.split()}"
            )
        archs.append(match[1] + match[2] + match[3].lower() + (match[4] or "").upper())
    return archs


def find_cuda() -> Cuda | str:
    """The CUDA toolkit, or the reason for leaving CUDA out."""
    wish = os.environ.get("DCAR_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"DCAR_FAST_CUDA={wish}: allowed are 0 and 1")
    if wish == "0":
        return "DCAR_FAST_CUDA=0 at build time"
    found = find_toolkit()
    if wish == "1" and isinstance(found, str):
        raise SetupError(f"DCAR_FAST_CUDA=1, but {found}")
    return found


def find_toolkit() -> Cuda | str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes] + [shutil.which("nvcc")]
    nvcc = next((path for path in candidates if path), None)
    if nvcc is None:
        return "nvcc is neither in $CUDA_HOME/bin nor on PATH"
    # nvcc on PATH may be a wrapper or a link: the real one says where its toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if top is None:
        raise SetupError(f"{nvcc} --dryrun names no toolkit:\n{dry_run.stderr}")
    root = Path(top[1]).resolve()
    libs = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    lib = next((folder for folder in libs if (folder / "libcudart_static.a").exists()), None)
    if lib is None:
        return f"libcudart_static.a is not in the toolkit of {nvcc} ({root})"
    archs = cuda_archs(nvcc)
    if not archs:
        return f"{nvcc} knows none of the architectures {', '.join(DEFAULT_CUDA_ARCHS)}"
    return Cuda(nvcc, lib, archs)


# The commands


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan(cxx: str, cuda: Cuda | str, build: Path, module: Path) -> list[Step]:
    """The steps that make ``module``; objects and dependency files go to ``build``. The last step links."""
    has_cuda = isinstance(cuda, Cuda)
    defines = ["-DDCAR_FAST_X86"] if X86 else []
    info = [
        *(["-DDCAR_FAST_CUDA"] if has_cuda else []),
        "-DDCAR_FAST_CUDA_ARCHS=" + ",".join(map(json.dumps, cuda.archs if has_cuda else [])),
        "-DDCAR_FAST_CUDA_LEFT_OUT=" + json.dumps("" if has_cuda else cuda),
    ]
    paths = sysconfig.get_paths()
    includes = [f"-I{folder}" for folder in dict.fromkeys((paths["include"], paths["platinclude"], pybind11_include()))]

    steps = []
    for source in sorted(CSRC.glob("*.cpp")):
        isa = source.stem.rpartition("_")[2]
        if isa in ISA_FLAGS and not X86:
            continue
        extra = [*info, *includes] if source.stem.startswith("bind") else ISA_FLAGS.get(isa, [])
        output, depfile = build / f"{source.name}.o", build / f"{source.name}.d"
        command = [cxx, *CXX_FLAGS, *defines, *extra, "-MMD", "-MF", str(depfile)]
        steps.append(Step(output, [source], [*command, "-c", str(source), "-o", str(output)], depfile))
    for source in sorted(CSRC.glob("*.cu")) if has_cuda else []:
        output, depfile = build / f"{source.name}.o", build / f"{source.name}.d"
        command = [
            cuda.nvcc,
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            *gencode_flags(cuda.archs),
        ]
        command += ["-ccbin", cxx, "-MMD", "-MF", str(depfile)]
        steps.append(Step(output, [source], [*command, "-c", str(source), "-o", str(output)], depfile))

    objects = [step.output for step in steps]
    # The static runtime's symbols stay inside: torch brings a runtime of its own.
    runtime = (
        [f"-L{cuda.lib}", "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"] if has_cuda else []
    )
    link = [cxx, "-shared", "-fopenmp", *map(str, objects), *runtime, "-o", str(module)]
    return [*steps, Step(module, objects, link)]


# Running them


def run_with_ninja(ninja: str, steps: list[Step], build: Path) -> None:
    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5", f"builddir = {path(build)}"]
    for number, step in enumerate(steps):
        lines += [f"rule r{number}", "  command = " + shlex.join(step.command).replace("$", "$$")]
        if step.depfile:
            lines += [f"  depfile = {path(step.depfile)}", "  deps = gcc"]
        lines += [f"build {path(step.output)}: r{number} " + " ".join(map(path, step.inputs))]
    ninja_file = build / "build.ninja"
    ninja_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if subprocess.run([ninja, "-f", str(ninja_file)]).returncode != 0:
        raise CompileError("the native module did not build; the compiler's message is above")


def run_without_ninja(steps: list[Step]) -> None:
    note("ninja is not installed; compiling everything anew")

    def run(step: Step) -> None:
        done = subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            raise CompileError(f"the native module did not build, the message is above: {shlex.join(step.command)}")

    *compiles, link = steps
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, compiles))
    run(link)


def find_ninja() -> str | None:
    if (on_path := shutil.which("ninja")) or not importlib.util.find_spec("ninja"):
        return on_path
    import ninja

    return str(Path(ninja.BIN_DIR, "ninja"))


class BuildNative(build_ext):
    """Builds the one extension with the commands of :func:`plan` instead of setuptools' own."""

    def build_extension(self, ext: Extension) -> None:
        cxx, cuda = find_cxx(), find_cuda()
        assert cxx is not None  # native_obstacle() is None
        if isinstance(cuda, Cuda):
            note(f"building CPU and CUDA kernels ({cuda.nvcc}, architectures {' '.join(cuda.archs)})")
        else:
            note(f"building CPU kernels only, CUDA is left out: {cuda}")
        build = Path(self.build_temp).resolve() / "native"
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        module.parent.mkdir(parents=True, exist_ok=True)
        steps = plan(cxx, cuda, build, module)
        if ninja := find_ninja():
            run_with_ninja(ninja, steps, build)
        else:
            run_without_ninja(steps)


def extensions() -> list[Extension]:
    if obstacle := native_obstacle():
        note(f"WARNING: installing without the native module, the slower PyTorch code is used: {obstacle}")
        return []
    return [Extension("dcar_fast._native", [str(path) for path in sorted(CSRC.glob("*.c*"))])]


setup(
    # kernels/ has no __init__.py on purpose: as a regular top-level package it would shadow the one of that name on the
    # package index. dcar_fast/__init__.py registers it for checkouts; a wheel holds it as dcar_fast/kernels.
    packages=[*find_packages(include=["dcar_fast", "dcar_fast.*"]), "dcar_fast.kernels"],
    package_dir={"dcar_fast.kernels": "kernels"},
    license="Apache-2.0",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
