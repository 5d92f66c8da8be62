"""``shapes``: a procedural, seeded, endless data set of one to three coloured shapes with captions.

Example i is a pure function of (seed, i). Prompts whose combination of objects, attributes and relation is held out
(:func:`dcar_fast.training.shapes.asks.is_held_out`) never occur in the training split, in no wording.
"""

from dcar_fast.training.shapes.render import render
from dcar_fast.training.shapes.scene import Ask, Object, Prompt, Wanted
from dcar_fast.training.shapes.source import ShapesSource, held_out_prompts, render_prompt

__all__ = ["Ask", "Object", "Prompt", "ShapesSource", "Wanted", "held_out_prompts", "render", "render_prompt"]
