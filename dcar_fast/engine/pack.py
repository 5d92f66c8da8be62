"""Packed weights, one set per module and kind, made anew when the module changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

PROBED = 16  # values of every tensor on a CPU that are looked at anew in every call


@dataclass
class _Entry:
    """What was built, the module's ``config`` if it has one, and every tensor it was built from, with the address and
    the version that it had. ``storages`` are held on to, so that an address cannot come back as somebody else's.
    ``probe``: some of their values."""

    config: object
    made_from: list[tuple[Tensor, int, int]]
    storages: list[Tensor]
    probe: Probe
    value: Any

    def is_of(self, config: object, tensors: list[Tensor]) -> bool:
        if config is not self.config and config != self.config:
            return False
        same = len(tensors) == len(self.made_from) and all(
            one is tensor and one.data_ptr() == address and _version(one) == version
            for one, (tensor, address, version) in zip(tensors, self.made_from, strict=True)
        )
        return same and self.probe.unchanged()


class Probe:
    """Some values of tensors on a CPU, to see what no version counts: writes through ``.data`` or ``numpy()``. On a GPU
    to look at a value is to wait for it, which is done where ``wait`` says so."""

    def __init__(self, tensors: list[Tensor], wait: bool) -> None:
        views: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            readable = tensor.device.type == "cpu" or (wait and tensor.device.type == "cuda")
            if readable and type(tensor) in (Tensor, nn.Parameter):  # no fake ones
                views.setdefault((tensor.dtype, tensor.device), []).append(_some(tensor))
        self._tensors = list(tensors)
        self._views = list(views.values())
        self._seen = self._bytes()

    def watches(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors that are looked at."""
        return len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True))

    def unchanged(self) -> bool:
        return all(torch.equal(now, seen) for now, seen in zip(self._bytes(), self._seen, strict=True))

    def _bytes(self) -> list[Tensor]:
        return [torch.cat(views).view(torch.uint8) for views in self._views]  # as bytes a NaN equals itself


def _some(tensor: Tensor) -> Tensor:
    """A view of about ``PROBED`` values that lie spread over the tensor (of its first row if it has gaps)."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # channels last
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.dim() - 1)]
    return flat[:: max(1, len(flat) // PROBED) | 1]  # odd, else it would keep to some columns of a matrix


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of torch.inference_mode do not count


_entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()
_lock = threading.RLock()


def packed(module: M, kind: Hashable, build: Callable[[M], T], wait: bool = False) -> T:
    """``build(module)``, kept as long as the module lives and its parameters, buffers and ``config`` stay the same.

    A change is an in-place update (an optimiser's step, ``load_state_dict``, an EMA swap by copying), another tensor
    (``.to()``, a merged adapter, an EMA swap by assignment) or another storage (``.data``). PyTorch does not count
    writes through ``.data`` or ``numpy()``, or to tensors made in ``torch.inference_mode``: on a CPU they are seen by
    some values of every tensor, on a GPU only with ``wait``, which waits for it in every call; else see :func:`forget`.
    What is built must not refer to ``module`` itself; all users of a module share what was built.
    """
    with _lock:
        config, tensors = getattr(module, "config", None), _tensors(module)
        kinds = _entries.setdefault(module, {})
        entry = kinds.get(kind)
        if entry is None or not entry.is_of(config, tensors):
            entry = None
            kinds.pop(kind, None)  # its memory first
            made_from = [(t, t.data_ptr(), _version(t)) for t in tensors]
            storages, probe = [t.detach() for t in tensors], Probe(tensors, wait)
            entry = kinds[kind] = _Entry(config, made_from, storages, probe, build(module))
        return entry.value


def forget(module: nn.Module) -> None:
    """Drops what was built from the module and its submodules, after a change that nobody can see."""
    with _lock:
        for one in module.modules():
            _entries.pop(one, None)


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers: what ``module.parameters()`` and ``buffers()`` give, in a third of the time."""
    found, modules = [], [module]
    while modules:
        one = modules.pop()
        found += [t for t in (*one._parameters.values(), *one._buffers.values()) if t is not None]
        modules += [child for child in one._modules.values() if child is not None]
    return found
