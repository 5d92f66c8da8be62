"""The procedural data set: what is asked is what is drawn, reproducibly, and held-out combinations stay out."""

from __future__ import annotations

import colorsys
import hashlib
import math
import re
from collections import Counter

import numpy as np
import pytest

from dcar_fast.training.shapes import ShapesSource, held_out_prompts, render, render_prompt
from dcar_fast.training.shapes.asks import OPPOSITE, combination, draw_ask, is_held_out
from dcar_fast.training.shapes.captions import caption
from dcar_fast.training.shapes.layout import APART, OFFSET, REACH, draw_scene
from dcar_fast.training.shapes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Ask,
    Background,
    Object,
    Prompt,
    Scene,
    Wanted,
)

BLACK = Background(0.0, 0.0, 0.0)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))


def white(shape: str, size: float, angle: float = 0.0, x: float = 0.5, y: float = 0.5) -> Object:
    return Object(shape, "red", size, x, y, hue=0.0, saturation=0.0, value=1.0, angle=angle)


def asks(count: int, **options) -> list[Ask]:
    generator = rng(1)
    return [draw_ask(generator, **options) for _ in range(count)]


# ---- pictures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.17])
def test_area_and_centre_are_what_the_object_says(shape, angle):
    """The light that a white shape adds to black is its area, and its centre of mass the shape's centre."""
    picture = render(Scene(BLACK, (white(shape, 0.3, angle, x=0.45, y=0.56),)), 256)[..., 0] / 255.0
    assert picture.sum() / 256**2 == pytest.approx(0.3**2, rel=0.01)
    centres = (np.arange(256) + 0.5) / 256
    assert (picture.sum(0) @ centres) / picture.sum() == pytest.approx(0.45, abs=0.002)
    assert (picture.sum(1) @ centres) / picture.sum() == pytest.approx(0.56, abs=0.002)


@pytest.mark.parametrize(("shape", "farthest"), [("circle", 1), ("square", 4), ("triangle", 3)])
def test_reach_is_the_farthest_point(shape, farthest):
    picture = render(Scene(BLACK, (white(shape, 0.4),)), 512)[..., 0]
    y, x = np.nonzero(picture > 127)
    reach = np.hypot((x + 0.5) / 512 - 0.5, (y + 0.5) / 512 - 0.5)
    assert reach.max() == pytest.approx(REACH[shape] * 0.4, abs=0.004)
    if farthest > 1:  # as many corners as the shape has
        corners = reach > reach.max() - 0.01
        directions = np.arctan2(y[corners] - 255.5, x[corners] - 255.5)
        assert len({round(a / math.radians(15)) % 24 for a in directions}) == farthest


def test_a_triangle_stands_on_its_side():
    picture = render(Scene(BLACK, (white("triangle", 0.4),)), 128)[..., 0] > 127
    rows = np.nonzero(picture.any(axis=1))[0]
    assert picture[rows[-1] - 1].sum() > 5 * picture[rows[0] + 1].sum()


def test_edges_are_smooth_and_later_objects_in_front():
    picture = render(Scene(BLACK, (white("circle", 0.4),)), 64)[..., 0]
    assert np.count_nonzero((picture > 0) & (picture < 255)) > 60
    green = Object("square", "green", 0.3, 0.5, 0.5, hue=1 / 3, saturation=1.0, value=1.0, angle=0.0)
    assert render(Scene(BLACK, (white("circle", 0.4), green)), 64)[32, 32].tolist() == [0, 255, 0]


def test_the_same_scene_at_two_sizes():
    scene = draw_scene(asks(1)[0], rng(3))
    small, large = render(scene, 64).astype(float), render(scene, 256).astype(float)
    assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 1.0


def test_backgrounds_are_pale_and_as_named():
    light = {"white": (0.93, 1), "black": (0, 0.12), "grey": (0.3, 0.75), "light": (0.65, 1), "dark": (0, 0.36)}
    for i in range(300):
        name = (*BACKGROUNDS, None)[i % 6]
        background = draw_scene(Ask("single object", (Wanted("circle"),), background=name), rng(i)).background
        pixels = render(Scene(background, ()), 32).reshape(-1, 3) / 255.0
        hsv = np.array([colorsys.rgb_to_hsv(*p) for p in pixels])
        assert hsv[hsv[:, 2] > 0.2, 1].max(initial=0) < 0.3
        if name:
            assert light[name][0] <= hsv[:, 2].min() and hsv[:, 2].max() <= light[name][1]


# ---- scenes


def test_scenes_show_what_is_asked_and_nothing_else():
    for i, ask in enumerate(asks(1500)):
        objects = draw_scene(ask, rng(2, i)).objects
        wanted = [w for w in ask.wanted for _ in range(w.count)]
        assert len(objects) == len(wanted)
        for o, w in zip(objects, wanted, strict=True):
            assert w.shape in (None, o.shape) and w.colour in (None, o.colour)
            low, high = SIZES[w.size] if w.size else (0.16, 0.42)
            assert low <= o.size <= high
            hue = (o.hue - COLOURS[o.colour] + 0.5) % 1 - 0.5
            assert abs(hue) <= 0.05 and o.saturation >= 0.6
            if ask.place != "centre":
                reach = o.size * REACH[o.shape]
                assert reach < min(o.x, o.y) and max(o.x, o.y) < 1 - reach
        for a, o in enumerate(objects):
            for p in objects[:a]:
                gap = math.hypot(o.x - p.x, o.y - p.y) - o.size * REACH[o.shape] - p.size * REACH[p.shape]
                assert gap >= APART - 1e-9


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations(relation):
    ask = Ask("position", (Wanted("circle"), Wanted("square")), relation=relation)
    for i in range(50):
        first, second = draw_scene(ask, rng(i)).objects
        right, down = first.x - second.x, first.y - second.y
        measured = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
        assert measured >= OFFSET and measured > max(abs(right), abs(down)) - 1e-9


@pytest.mark.parametrize("place", PLACES)
def test_places(place):
    for i in range(50):
        (o,) = draw_scene(Ask("colours", (Wanted("triangle", "red"),), place=place), rng(i)).objects
        if place == "centre":
            assert max(abs(o.x - 0.5), abs(o.y - 0.5)) <= 0.08 + 1e-9
        else:
            assert ("left" in place) == (o.x < 0.5) and ("top" in place) == (o.y < 0.5)


def test_little_varies_with_few():
    """Five places, what does not fit in the corners an eighth further in; one shade, three sizes and nothing but medium
    ones where none is asked for; plain backgrounds. What is asked for is kept."""
    seen, shades, sizes = set(), set(), set()
    for i, ask in enumerate(asks(400)):
        scene = draw_scene(ask, rng(3, i), "few")
        assert scene.background.value in (0.06, 0.2, 0.5, 0.8, 0.97)
        assert (scene.background.texture, scene.background.saturation) == ("plain", 0.0)
        unsaid = [o for o in scene.objects if all(w.size is None for w in ask.wanted)]
        assert all(o.size == sum(SIZES["medium"]) / 2 for o in unsaid)
        for o in scene.objects:
            assert (o.x == 0.5) == (o.y == 0.5)
            seen |= {o.x, o.y}
            shades |= {(o.colour, o.hue, o.saturation, o.value)}
            sizes |= {o.size}
            reach = o.size * REACH[o.shape]
            fits = reach + 0.02 <= 0.25
            assert {o.x, o.y} <= ({0.25, 0.5, 0.75} if fits else {0.375, 0.5, 0.625})
            if ask.place and ask.place != "centre":
                assert ("left" in ask.place) == (o.x < 0.5) and ("top" in ask.place) == (o.y < 0.5)
    assert seen == {0.25, 0.375, 0.5, 0.625, 0.75} and len(shades) == 4 and len(sizes) == 3
    for ask in asks(50):
        objects = [draw_scene(ask, rng(4, i)).objects for i in range(2)]
        assert all(8 * o.x == int(8 * o.x) for one in objects for o in one)


# ---- prompts


def test_every_category_and_every_word_is_in_both_parts():
    words = {}
    for held_out in (False, True):
        generator, drawn = rng(5), asks(4000, held_out=held_out)
        assert set(Counter(a.category for a in drawn)) == set(CATEGORIES)
        words[held_out] = set(re.findall(r"[a-z0-9]+", " ".join(caption(a, generator) for a in drawn).lower()))
    assert words[True] <= words[False], "a held-out prompt has no word that training lacks"
    assert {*SHAPES, *COLOURS, "small", "large", "two", "three", "left", "right", "above", "below"} <= words[True]


def test_parts_are_disjoint_in_combinations():
    training, held_out = ({combination(a) for a in asks(6000, held_out=part)} for part in (False, True))
    assert not training & held_out
    assert 0.12 < len(held_out) / len(training | held_out) < 0.28
    for category in CATEGORIES:
        assert len({combination(a) for a in asks(500, category=category, held_out=True)}) >= 8


def test_combinations_do_not_depend_on_the_way_of_saying_it():
    red, blue = Wanted("circle", "red"), Wanted("square", "blue")
    left, right = (
        Ask("position", pair, relation=r) for pair, r in (((red, blue), "left of"), ((blue, red), "right of"))
    )
    assert combination(left) == combination(right) != combination(Ask("position", (blue, red), relation="left of"))
    assert combination(Ask("attribute binding", (red, blue))) == combination(Ask("attribute binding", (blue, red)))
    with_background = Ask("attribute binding", (red, blue), background="white")
    assert is_held_out(with_background) == is_held_out(Ask("attribute binding", (red, blue)))


def test_captions_say_what_is_asked():
    """Read back by plain word matching: colours, shapes, counts, relation."""
    generator = rng(9)
    for ask in asks(2000):
        text = caption(ask, generator).lower()
        words = re.findall(r"[a-z0-9]+", text)
        assert Counter(w for w in words if w in COLOURS) == Counter(w.colour for w in ask.wanted if w.colour), text
        nouns = Counter(w.rstrip("s") for w in words if w.rstrip("s") in SHAPES)
        assert nouns == Counter(w.shape for w in ask.wanted), text
        counts = {"two": 2, "2": 2, "three": 3, "3": 3}
        assert max(counts.get(w, 1) for w in words) == max(w.count for w in ask.wanted), text
        if ask.relation:
            said = next(
                r
                for r, ways in {
                    "left of": ("left",),
                    "right of": ("right",),
                    "above": ("above", "over"),
                    "below": ("below", "under", "beneath"),
                }.items()
                if set(ways) & set(words)
            )
            if len({w.shape for w in ask.wanted}) == 2:  # who is named first?
                first = next(w.rstrip("s") for w in words if w.rstrip("s") in SHAPES)
                assert said == (ask.relation if first == ask.wanted[0].shape else OPPOSITE[ask.relation]), text


def test_held_out_prompts_are_distinct_and_balanced():
    prompts = held_out_prompts(600, seed=3)
    assert len({p.text for p in prompts}) == 600
    assert set(Counter(p.ask.category for p in prompts).values()) == {100}
    assert all(is_held_out(p.ask) for p in prompts)
    assert held_out_prompts(600, seed=3) == prompts != held_out_prompts(600, seed=4)
    assert held_out_prompts(12, seed=3) == prompts[:12]


# ---- the source


def test_examples_are_a_function_of_seed_and_index():
    source = ShapesSource(32, seed=7)
    again = [ShapesSource(32, seed=7).example(i) for i in (5, 0)]
    for example, same in zip((source.example(5), source.example(0)), again, strict=True):
        assert (example.key, example.caption) == (same.key, same.caption)
        assert np.array_equal(example.image, same.image)
    others = (
        source.example(6),
        ShapesSource(32, seed=8).example(5),
        ShapesSource(32, seed=7, held_out=True).example(5),
    )
    assert all(not np.array_equal(source.example(5).image, other.image) for other in others)
    assert source.example(5).image.shape == (32, 32, 3) and source.example(5).image.dtype == np.uint8


def test_examples_stay_what_they_are():
    """Trained models and documented scores depend on these pictures: a change must be meant."""
    examples = [ShapesSource(64, seed=0).example(i) for i in range(200)]
    assert examples[0].caption == "a drawing of a red circle next to one blue triangle on a black background"
    assert hashlib.sha256("\n".join(e.caption for e in examples).encode()).hexdigest()[:16] == "fd5af2b2c8c6e271"
    assert [e.image.mean() for e in examples[:5]] == pytest.approx([23.6, 205.54, 88.92, 88.83, 21.31], abs=0.02)


def test_pictures_of_a_prompt():
    prompt = Prompt("two red circles", Ask("counting", (Wanted("circle", "red", count=2),)))
    one, other = render_prompt(prompt, seed=1), render_prompt(prompt, seed=2)
    assert one.shape == (64, 64, 3) and not np.array_equal(one, other)
    assert np.array_equal(one, render_prompt(prompt, seed=1))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ShapesSource(15), "size"),
        (lambda: ShapesSource(True), "size"),
        (lambda: ShapesSource(64, variety="some"), "variety"),
        (lambda: ShapesSource(64, variety=4), "variety"),
        (lambda: ShapesSource(64, seed=-1), "seed"),
        (lambda: ShapesSource(64).example(-1), "index"),
        (lambda: held_out_prompts(0), "count"),
        (lambda: held_out_prompts(5000), "count"),
        (lambda: render(Scene(BLACK, ()), 8), "size"),
        (lambda: render_prompt(held_out_prompts(1)[0], seed=-2), "seed"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ValueError, match=name):
        call()
