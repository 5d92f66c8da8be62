"""Times GPU work between CUDA events, for the tuner and the benchmarks of single ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dcar_fast.ops._dispatch import current

ROUNDS = 30


def event_timer(device: torch.device, rounds: int = ROUNDS) -> Callable[[Mapping[Any, Callable[[], object]]], dict]:
    """A timer for GPU work: seconds between two events around each call, ``rounds`` of them, the calls in turns.

    A write larger than the L2 cache comes before each: the call finds nothing cached, and is enqueued while the GPU is
    busy, so that the time of its launch does not count unless it is longer than that write.
    """
    size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)

    def measure(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
        """Seconds of every round, by name; two rounds before are not counted."""
        spoil = torch.empty(size, dtype=torch.uint8, device=device)
        events: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        names = list(calls)
        with current(device):
            for call in [*calls.values()] * 2:
                call()
            for turn in range(rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    spoil.zero_()
                    start.record()
                    calls[name]()
                    end.record()
                    events[name].append((start, end))
            torch.cuda.synchronize(device)
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    return measure
