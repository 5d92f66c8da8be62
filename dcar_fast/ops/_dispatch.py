"""Chooses the implementation of an op, and can say why.

An op registers its implementations in the order in which "auto" prefers them. What runs is, in this order: the
``backend`` argument, the environment variable ``DCAR_FAST_BACKEND`` (read here and nowhere else), the first that can
run on the device of the inputs. A backend that was asked for and cannot run is an error; only "auto" passes over one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

BACKENDS = ("cuda", "triton", "native", "reference")
ENVIRONMENT = "DCAR_FAST_BACKEND"
TRITON_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)  # has instructions for it

logger = logging.getLogger(__name__)


class Usable(NamedTuple):
    """Whether a backend can run, and what makes it so."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: ``run`` takes the op's checked arguments, ``usable`` judges a device. ``launches``:
    the GPU kernels that one call launches, or a function of the operator's arguments that tells; None where PyTorch's
    own run in a number that nobody promised."""

    name: str
    run: Callable[..., Any]
    usable: Callable[[torch.device], Usable]
    launches: int | Callable[..., int] | None = None


_ops: dict[str, tuple[Backend, ...]] = {}


def register(op: str, *backends: Backend) -> None:
    """Declares the implementations of ``op``, most preferred first. ValueError for a name outside ``BACKENDS``."""
    unknown = [backend.name for backend in backends if backend.name not in BACKENDS]
    if unknown:
        raise ValueError(f"{op}: backends {unknown} are not among {BACKENDS}")
    _ops[op] = backends


def requested() -> str:
    """The backend that ``DCAR_FAST_BACKEND`` asks for; "auto" where it is unset or empty. Not checked."""
    return os.environ.get(ENVIRONMENT) or "auto"


def choose(op: str, device: torch.device, backend: str | None = None) -> Backend:
    """The implementation of ``op`` for inputs on ``device``.

    ``backend``: None takes ``DCAR_FAST_BACKEND``, or "auto" where that is unset or empty; "auto" takes the first usable
    one and logs it at INFO, once per op and device; another name takes that one. ValueError if the name is unknown or
    that backend cannot run here, with the reason.
    """
    origin = "backend"
    if backend is None:
        backend, origin = requested(), ENVIRONMENT
    if backend == "auto":
        return _automatic(op, device)
    if backend not in BACKENDS:
        raise ValueError(f"{origin} is {backend!r}, allowed are {', '.join(map(repr, ('auto', *BACKENDS)))}")
    return _explicit(op, device, backend, origin)


def choose_for(
    op: str, x: torch.Tensor, backend: str | None, without: tuple[torch.dtype, ...] = (torch.float64,)
) -> Backend:
    """As :func:`choose`, for ops whose kernels lack the types ``without``: for these "auto" takes the reference, a
    request for another backend is refused."""
    if x.dtype not in without:
        return choose(op, x.device, backend)
    if (requested() if backend is None else backend) == "auto":
        return choose(op, x.device, "reference")
    asked = choose(op, x.device, backend)
    if asked.name != "reference":
        raise ValueError(f"backend is {asked.name!r}, which cannot run {op} on {x.dtype}: 'reference' can")
    return asked


@cache
def _explicit(op: str, device: torch.device, name: str, origin: str) -> Backend:
    usable = judge(op, device)[name]
    if not usable.ok:
        raise ValueError(f"{origin} is {name!r}, which cannot run {op} on {device}: {usable.reason}")
    return next(backend for backend in _ops[op] if backend.name == name)


@cache
def _automatic(op: str, device: torch.device) -> Backend:
    passed_over = []
    for backend in _ops[op]:
        usable = backend.usable(device)
        if usable.ok:
            because = "".join(f"; not {name}: {reason}" for name, reason in passed_over)
            logger.info("%s on %s: %s (%s%s)", op, device, backend.name, usable.reason, because)
            return backend
        passed_over.append((backend.name, usable.reason))
    raise ValueError(f"nothing can run {op} on {device}: {passed_over}")


def judge(op: str, device: torch.device) -> dict[str, Usable]:
    """For every backend name, whether it can run ``op`` on ``device``, and why or why not."""
    implemented = {backend.name: backend.usable(device) for backend in _ops[op]}
    return {name: implemented.get(name, Usable(False, f"{op} has no {name} implementation")) for name in BACKENDS}


def report(device: torch.device | str) -> dict[str, dict[str, Usable]]:
    """:func:`judge` for every op: ``report("cpu")["vq_lookup"]["native"]`` is ``(usable, reason)``."""
    return {op: judge(op, torch.device(device)) for op in sorted(_ops)}


def launches(op: str, *arguments: Any, **keywords: Any) -> int | None:
    """The kernels that Triton launches for one call of the operator ``dcar_fast::<op>`` with these arguments; None for
    an op that has no Triton implementation or promises no number."""
    declared = next((backend.launches for backend in _ops[op] if backend.name == "triton"), None)
    return declared(*arguments, **keywords) if callable(declared) else declared


def everywhere(device: torch.device) -> Usable:
    """The judgement on plain PyTorch."""
    return Usable(True, "plain PyTorch, runs everywhere")


def triton_usable(device: torch.device) -> Usable:
    """The judgement on a Triton kernel."""
    if device.type != "cuda":
        return Usable(False, f"Triton kernels run on CUDA devices, this is {device.type}")
    if torch.version.hip is not None:
        return Usable(False, "this torch is built for AMD GPUs")
    if importlib.util.find_spec("triton") is None:
        return Usable(False, "triton is not installed")
    if not torch.cuda.is_available():
        return Usable(False, "torch sees no CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return Usable(False, f"needs compute capability {TRITON_CAPABILITY}, {device} has {capability}")
    return Usable(True, "triton is installed")


def float8_usable(device: torch.device) -> Usable:
    """The judgement on a Triton kernel that reads or writes float8."""
    usable = triton_usable(device)
    if usable.ok and (capability := torch.cuda.get_device_capability(device)) < FLOAT8_CAPABILITY:
        return Usable(False, f"float8 needs compute capability {FLOAT8_CAPABILITY}, {device} has {capability}")
    return usable


def choose_float8(op: str, device: torch.device, backend: str | None) -> Backend:
    """As :func:`choose`, for calls on float8 of an op that takes other types too: where a GPU lacks it "auto" takes the
    reference, and a request for Triton is refused."""
    chosen, usable = choose(op, device, backend), float8_usable(device)
    if chosen.name != "triton" or usable.ok:
        return chosen
    if (requested() if backend is None else backend) == "auto":
        return choose(op, device, "reference")
    raise ValueError(f"backend is 'triton', which cannot run {op} on {device}: {usable.reason}")


def current(device: torch.device) -> AbstractContextManager[object]:
    """Context in which ``device`` is the current CUDA device; kernels launch on the current one."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
