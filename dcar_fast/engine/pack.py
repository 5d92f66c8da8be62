"""Packed weights, one set per module and kind, made anew when the module changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass
class _Entry:
    """What was built, and every tensor it was built from, with the address and the version that it had. ``storages``
    are held on to, so that an address cannot come back as somebody else's."""

    made_from: list[tuple[Tensor, int, int]]
    storages: list[Tensor]
    value: Any

    def is_of(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self.made_from) and all(
            one is tensor and one.data_ptr() == address and one._version == version
            for one, (tensor, address, version) in zip(tensors, self.made_from, strict=True)
        )


_entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()
_lock = threading.RLock()


def packed(module: M, kind: Hashable, build: Callable[[M], T]) -> T:
    """``build(module)``, kept as long as the module lives and its parameters and buffers stay what they were.

    A change is an in-place update (an optimiser's step, ``load_state_dict``, an EMA swap by copying), another tensor
    (``.to()``, a merged adapter, an EMA swap by assignment) or another storage (``.data``). What is built must not
    refer to ``module`` itself; all users of a module share what was built.
    """
    with _lock:
        tensors = _tensors(module)
        kinds = _entries.setdefault(module, {})
        entry = kinds.get(kind)
        if entry is None or not entry.is_of(tensors):
            entry = None
            kinds.pop(kind, None)  # its memory first
            made_from = [(t, t.data_ptr(), t._version) for t in tensors]
            entry = kinds[kind] = _Entry(made_from, [t.detach() for t in tensors], build(module))
        return entry.value


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers: what ``module.parameters()`` and ``buffers()`` give, in a third of the time."""
    found, modules = [], [module]
    while modules:
        one = modules.pop()
        found += [t for t in (*one._parameters.values(), *one._buffers.values()) if t is not None]
        modules += [child for child in one._modules.values() if child is not None]
    return found
