"""The progress bars of the pipeline."""

from __future__ import annotations

import time

from tqdm import tqdm


class SamplingBar:
    """One progress bar over all batches; it ticks at every unmasking step, denoising step and decoded batch."""

    def __init__(self, shown: bool, batches: int, steps: int) -> None:
        self._bar = tqdm(total=batches * (steps + 1), disable=not shown, unit="step")
        self._done: dict[str, int] = {}  # steps of each stage of this batch

    def __enter__(self) -> SamplingBar:
        self._bar.set_description("text")
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def step(self, name: str, done: int, total: int) -> None:
        self._bar.set_description("decode" if (name, done) == ("head", total) else name, refresh=False)
        self._bar.update(done - self._done.get(name, 0))  # a graph reports all of its steps at once
        self._done[name] = done

    def decoded(self) -> None:
        self._bar.update(1)
        self._done.clear()


class ImageBar:
    """Images drawn of all that are to be drawn, images per second and the time left, and what is going on."""

    def __init__(self, shown: bool, total: int, title: str = "") -> None:
        self._bar = tqdm(
            total=total,
            disable=not shown,
            desc=title,
            unit=" images",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        )
        self._shown_at = 0.0

    def __enter__(self) -> ImageBar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def step(self, name: str, done: int, total: int) -> None:
        """A batch may take minutes: shows its stage, but not more than once a second."""
        if not self._bar.disable and time.monotonic() - self._shown_at >= 1.0:
            self._shown_at = time.monotonic()
            self._bar.set_postfix_str(f"{name} {done}/{total}")

    def drawn(self, count: int) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(count)
