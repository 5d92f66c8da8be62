"""The compiled module ``dcar_fast._native``, or the reason why there is none."""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType

import torch

from dcar_fast.ops._dispatch import Usable


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        # After torch, so that both use one OpenMP runtime and its threads.
        return importlib.import_module("dcar_fast._native"), ""
    except ModuleNotFoundError:
        return None, "dcar_fast._native was not built: pip builds it where it finds a C++ compiler and Python's headers"
    except ImportError as error:
        return None, f"dcar_fast._native does not load: {error}"


def module() -> ModuleType:
    """The native module; RuntimeError with the reason if there is none."""
    native, reason = _load()
    if native is None:
        raise RuntimeError(reason)
    return native


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied if its numbers do not start where C++ may read them; such tensors come from packed NumPy arrays."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def cpu_usable(device: torch.device) -> Usable:
    """The judgement on a C++ CPU kernel."""
    native, reason = _load()
    if native is None:
        return Usable(False, reason)
    if device.type != "cpu":
        return Usable(False, f"the C++ kernels run on the CPU, this is {device.type}")
    return Usable(True, f"C++ for {native.cpu_isa()}")


def cuda_usable(device: torch.device) -> Usable:
    """The judgement on a CUDA C++ kernel."""
    native, reason = _load()
    if native is None:
        return Usable(False, reason)
    if not native.cuda_compiled():
        return Usable(False, f"built without CUDA: {native.cuda_left_out()}")
    if device.type != "cuda":
        return Usable(False, f"the CUDA kernels run on CUDA devices, this is {device.type}")
    if torch.version.hip is not None:
        return Usable(False, "this torch is built for AMD GPUs")
    if not torch.cuda.is_available():
        return Usable(False, "torch sees no CUDA device")
    capability = torch.cuda.get_device_capability(device)
    archs = native.cuda_archs()
    if not any(runs_on(arch, capability) for arch in archs):
        return Usable(False, f"built for {', '.join(archs)}, {device} has compute capability {capability}")
    built, driver = native.cuda_versions()
    if built // 1000 > driver // 1000:  # within a major version every driver runs every runtime
        return Usable(False, f"built with CUDA {_version(built)}, the driver here supports {_version(driver)}")
    return Usable(True, f"CUDA C++ built for {', '.join(archs)}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch`` ("80", "90a", "100+PTX") runs on a device of this compute capability.

    Machine code runs on its own major version from its minor version on, with the suffix a on exactly its own version;
    PTX is compiled by the driver for everything newer (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
    if match is None:
        raise ValueError(f"arch is {arch!r}, allowed are forms like '80', '90a' and '100+PTX'")
    built = int(match[1]), int(match[2])
    if match[3]:
        return capability == built if match[3] == "a" else capability[0] == built[0] and capability >= built
    return capability >= built and (capability[0] == built[0] or match[4] is not None)
