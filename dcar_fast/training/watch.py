"""What stops a run before its last step: a signal, or losses and gradients that are no numbers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """The loss or its gradients were infinite or not a number."""


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the run; everything up to the last step is saved."""


class Watch:
    """Lets all processes of a run stop at the same step. Inside its block SIGINT and SIGTERM only ask to stop. Both may
    come twice at once, as launchers pass on what the whole process group got: a second SIGINT acts as ever if it comes
    ``AGAIN`` seconds or more after the first signal, a second SIGTERM never does (who cannot wait sends SIGKILL).

    Each update of weights is looked at. On a CPU the answer is known before it is made. On a GPU waiting for the answer
    would leave the GPU idle: there the watch is ``delayed``, the answer is fetched while the next step runs, and
    :meth:`settle` waits for it before anything is written, so that weights that an infinite gradient has spoilt never
    leave the process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    AGAIN = 1.0

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device, self.world_size = device, world_size
        self.delayed = device.type == "cuda"
        self._asked = self._agreed = False
        self._pending: list[tuple[Callable[[], list[float]], int, list[str]]] = []
        self._old: dict[signal.Signals, Any] = {}
        self._since = 0.0  # of the first signal

    @property
    def stop(self) -> bool:
        """Whether the run is to end with this step; the same on all processes once :meth:`settle` was called."""
        return self._agreed if self.world_size > 1 else self._asked

    def look(self, bad: Tensor, step: int, keys: list[str]) -> None:
        """bad: bool scalar on the device, whether this update must not be made; keys: of the step's examples.
        Raises :class:`NonFiniteLoss`, here or in a later call, if any process has a bad one."""
        self.settle()
        flags = torch.stack([bad.float(), torch.full((), float(self._asked), device=self.device)])
        if self.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._pending.append((fetched(flags), step, keys))
        if not self.delayed:
            self.settle()

    def settle(self) -> None:
        """Waits for the answers that are still on their way."""
        while self._pending:
            answer, step, keys = self._pending.pop(0)
            bad, stop = answer()
            self._agreed = self._agreed or bool(stop)
            if bad:
                self._refuse(step, keys)

    def _refuse(self, step: int, keys: list[str]) -> None:
        if self.world_size > 1:
            from accelerate.utils import gather_object

            keys = gather_object(keys)
        raise NonFiniteLoss(f"step {step + 1}: the loss or its gradients are not finite; the examples were {keys}")

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, _: object) -> None:
        if not self._asked:
            self._asked, self._since = True, time.monotonic()
            with suppress(OSError):  # past Python's buffers: the signal may have come in the middle of a print
                os.write(2, f"{signal.Signals(number).name}: the run ends after this step\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since >= self.AGAIN:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


def fetched(values: Tensor) -> Callable[[], list[float]]:
    """A function that gives the numbers; their way from a GPU begins now, and only the function waits for it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[float]:
        event.synchronize()
        return host.tolist()

    return wait
