"""The progress bar of the pipeline."""

from __future__ import annotations

from tqdm import tqdm


class SamplingBar:
    """One progress bar over all batches; it ticks at every unmasking step, denoising step and decoded batch."""

    def __init__(self, shown: bool, batches: int, steps: int) -> None:
        self._bar = tqdm(total=batches * (steps + 1), disable=not shown, unit="step")

    def __enter__(self) -> SamplingBar:
        self._bar.set_description("text")
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def step(self, name: str, done: int, total: int) -> None:
        self._bar.set_description("decode" if (name, done) == ("head", total) else name, refresh=False)
        self._bar.update(1)

    def decoded(self) -> None:
        self._bar.update(1)
