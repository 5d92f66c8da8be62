"""The data set: examples by index, held-out prompts, and pictures that show what a prompt asks for."""

from __future__ import annotations

import numpy as np

from dcar_fast.training.data.examples import Example
from dcar_fast.training.shapes.asks import draw_ask
from dcar_fast.training.shapes.captions import caption
from dcar_fast.training.shapes.layout import draw_scene
from dcar_fast.training.shapes.render import MAX_SIZE, MIN_SIZE, render
from dcar_fast.training.shapes.scene import CATEGORIES, Prompt
from dcar_fast.training.shapes.variety import VARIETIES

# first words of the random generators' keys: training pictures, held-out prompts, pictures of given prompts
TRAINING, HELD_OUT, PICTURES = range(3)


class ShapesSource:
    """Endless pictures of ``size`` x ``size`` pixels with captions; example i is a pure function of (seed, i).

    held_out: draw from the combinations that training never sees instead. variety: "full", or "few" to vary little that
    captions do not speak of. ``ValueError`` for a size out of 16..4096 or another variety.
    """

    def __init__(self, size: int = 64, seed: int = 0, held_out: bool = False, variety: str = "full") -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size must be an integer in {MIN_SIZE}..{MAX_SIZE} pixels, got {size!r}")
        if variety not in VARIETIES:
            raise ValueError(f"variety must be one of {tuple(VARIETIES)}, got {variety!r}")
        self.size, self.seed, self.held_out, self.variety = size, _checked(seed, "seed"), held_out, variety

    def example(self, index: int) -> Example:
        """Example ``index`` >= 0."""
        rng = np.random.default_rng([HELD_OUT if self.held_out else TRAINING, self.seed, _checked(index, "index")])
        ask = draw_ask(rng, held_out=self.held_out)
        text = caption(ask, rng)
        return Example(f"shapes-{self.seed}-{index}", render(draw_scene(ask, rng, self.variety), self.size), text)


def held_out_prompts(count: int = 600, seed: int = 0) -> list[Prompt]:
    """``count`` different prompts of held-out combinations, in turn from the six categories.

    ``ValueError`` for a count that is not positive, or larger than what can be told apart.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1200:
        raise ValueError(f"count must be an integer in 1..1200, got {count!r}")
    rng = np.random.default_rng([HELD_OUT, _checked(seed, "seed")])
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        ask = draw_ask(rng, CATEGORIES[len(prompts) % len(CATEGORIES)], held_out=True)
        prompt = Prompt(caption(ask, rng), ask)
        prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def render_prompt(prompt: Prompt, seed: int = 0, size: int = 64) -> np.ndarray:
    """A random picture (size, size, 3) uint8 RGB that shows what the prompt asks for."""
    return render(draw_scene(prompt.ask, np.random.default_rng([PICTURES, _checked(seed, "seed")])), size)


def _checked(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return int(value)
