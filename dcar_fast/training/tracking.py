"""What a run tells: metrics.jsonl, accelerate's trackers, preview pictures, and a line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dcar_fast._files import write_atomically
from dcar_fast.training.checkpoint import flat

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS = "metrics.jsonl"


class Means:
    """Means of metrics over the steps since the last line of the log. They stay on the device until it is written."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """The means, also over the processes, all of which must call it and have the same metrics."""
        sums = self._reduced(accelerator)
        return {name: value / self._counts[name] for name, value in sums.items()}

    def clear(self) -> None:
        self._sums, self._counts = {}, {}

    def state_dict(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Sums, as means over the processes, and counts; for a checkpoint between two lines."""
        return {name: [value, self._counts[name]] for name, value in self._reduced(accelerator).items()}

    def load_state_dict(self, state: dict[str, list[float]], device: torch.device) -> None:
        self._sums = {name: torch.tensor(s, dtype=torch.float64, device=device) for name, (s, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}

    def _reduced(self, accelerator: Accelerator) -> dict[str, float]:
        if not self._sums:
            return {}
        values = torch.stack([value.to(accelerator.device) for value in self._sums.values()])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "mean")
        return dict(zip(self._sums, values.tolist(), strict=True))


class Clock:
    """Seconds of training, pauses for checkpoints and previews left out."""

    def __init__(self, before: float = 0.0) -> None:
        self.before, self._start = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning of the run, earlier parts of it included."""
        return self.before + time.monotonic() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        at = time.monotonic()
        yield
        self._start += time.monotonic() - at


class Log:
    """The main process's log of a run; on the others it does nothing.

    metrics.jsonl has one object per line: "step" (steps done), the metrics, "images_per_second" and "seconds" (of
    training). A number that is none is null. Lines behind the step from which a run continues are taken out first.
    """

    def __init__(self, accelerator: Accelerator, output: Path, settings: dict[str, Any], step: int, total: int) -> None:
        self._accelerator, self._output, self._total = accelerator, output, total
        self.main, self.last = accelerator.is_main_process, {}
        self._bar: tqdm | None = None
        accelerator.init_trackers(
            "log",
            config={key: _plain(value) for key, value in flat(settings).items()} if step == 0 else None,
            init_kwargs={"tensorboard": {"purge_step": step + 1}} if step else None,
        )
        if not self.main:
            return
        (output / "previews").mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(output / METRICS) if line["step"] <= step]
        self.last = kept[-1] if kept else {}
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(output / METRICS, lambda path: path.write_text(text))
        self._file = open(output / METRICS, "a")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, values: dict[str, float], images_per_second: float, clock: Clock, left: float) -> None:
        """left: seconds to the end, estimated."""
        if not self.main:
            return
        numbers = values | {"images_per_second": images_per_second, "seconds": clock.seconds}
        self.last = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps(self.last) + "\n")
        self._file.flush()
        self._accelerator.log(numbers, step=step)
        hidden = ("learning_rate", "waiting_for_data")
        shown = {name: value for name, value in values.items() if not name.endswith(hidden)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        text += f"  {images_per_second:.4g} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self._total}  {text}  {timedelta(seconds=round(left))} left")

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Saved as previews/NAME-00001000.png, and given to the trackers that take pictures."""
        for name, picture in pictures.items():
            write_atomically(
                self._output / "previews" / f"{name}-{step:08d}.png", lambda p, i=picture: i.save(p, "PNG")
            )
        for tracker in self._accelerator.trackers if pictures else ():
            if tracker.name == "tensorboard":
                arrays = {name: np.asarray(picture.convert("RGB"))[None] for name, picture in pictures.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif tracker.name == "aim":
                tracker.log_images(pictures, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture] for name, picture in pictures.items()}, step=step)

    def say(self, text: str) -> None:
        """A line on the main process's standard error."""
        if self.main:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        for tracker in self._accelerator.trackers:
            tracker.finish()
        if self._bar is not None:
            self._bar.close()
        if self.main:
            self._file.close()


def check_trackers(names: tuple[str, ...]) -> None:
    """``ValueError`` for trackers that accelerate does not know, or whose package is not there (which accelerate would
    leave out in silence)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"run.trackers must be among {sorted(known)}, got {unknown}")
    missing = sorted(set(names) - {str(getattr(name, "value", name)) for name in get_available_trackers()})
    if missing:
        raise ValueError(f"run.trackers: the packages of {missing} are not installed; choose others, or []")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last one may be cut off."""
    found = []
    for text in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        found.append(line)
    return found


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
