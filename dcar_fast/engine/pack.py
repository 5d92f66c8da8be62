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
    stamp: list[tuple]
    made_from: list[Tensor]
    value: Any


_entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()
_lock = threading.RLock()


def packed(module: M, kind: Hashable, build: Callable[[M], T]) -> T:
    """``build(module)``, kept as long as the module lives and its parameters and buffers stay what they were.

    A change is an in-place update (an optimiser's step, ``load_state_dict``, an EMA swap by copying), another tensor
    (``.to()``, a merged adapter, an EMA swap by assignment) or another storage (``.data``). What is built must not
    refer to ``module`` itself. The tensors it was built from are held on to, so that their addresses cannot come back
    as somebody else's; all users of a module share what was built.
    """
    with _lock:
        tensors = [*module.parameters(), *module.buffers()]
        stamp = [(t.data_ptr(), t._version, t.dtype, t.device, t.shape) for t in tensors]
        kinds = _entries.setdefault(module, {})
        entry = kinds.get(kind)
        if entry is None or entry.stamp != stamp:
            kinds.pop(kind, None)  # its memory first
            entry = kinds[kind] = _Entry(stamp, [t.detach() for t in tensors], build(module))
        return entry.value
