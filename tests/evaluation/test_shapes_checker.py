"""The checker of ShapesEval on pictures that PIL draws, independently of the data's own renderer."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar_fast.evaluation import shapes_checker
from dcar_fast.evaluation._components import grow, label, shrink
from dcar_fast.evaluation.shapes_checker import check, look
from dcar_fast.training.shapes.scene import Ask, Wanted
from tests.evaluation.drawing import HUES, Thing, degraded, draw, plain, random_things, rgb, textured

RED, GREEN, BLUE, YELLOW = (rgb(hue, 0.9, 0.9) for hue in HUES.values())
GREY = (150, 150, 150)


def _kinds(picture):
    return sorted((str(o.shape), str(o.colour), o.size) for o in look(picture).found)


def _picture(*things, background=GREY, size=64):
    return draw(plain(size, background), list(things))


@pytest.mark.parametrize(
    ("how", "size", "count", "least"),
    [
        ("none", 64, 600, 0.99),
        ("jpeg", 64, 300, 0.97),
        ("blur", 64, 300, 0.97),
        ("noise", 64, 300, 0.97),
        ("none", 32, 150, 0.97),
        ("jpeg", 256, 60, 0.97),
        ("none", 512, 40, 0.97),
    ],
)
def test_it_names_what_was_drawn(how, size, count, least):
    rng, right = np.random.default_rng(7), 0
    for _ in range(count):
        kinds, things = random_things(rng)
        if rng.uniform() < 0.7:
            background = textured(size, rng)
        else:
            background = plain(size, rgb(rng.uniform(), rng.uniform(0, 0.28), rng.uniform(0, 1)))
        right += _kinds(degraded(draw(background, things), how, rng)) == sorted(kinds)
    assert right >= least * count


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (120, 130, 140), (190, 255, 190)])
@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_area_and_centre_do_not_depend_on_the_ground(shape, background):
    """The outline's share is measured: on white and on black the same size comes out, to 2 % and 0.2 pixels."""
    (found,) = look(_picture(Thing(shape, RED, 0.43, 0.58, 0.205, 4), background=background)).found
    assert found.side == pytest.approx(0.205, rel=0.02)
    assert (found.x, found.y) == (pytest.approx(0.43, abs=0.003), pytest.approx(0.58, abs=0.003))


@pytest.mark.parametrize("angle", [0, 10, 20, 45, 60, 75])
@pytest.mark.parametrize("shape", ["square", "triangle"])
def test_any_rotation(shape, angle):
    (found,) = look(_picture(Thing(shape, BLUE, 0.5, 0.5, 0.18, angle))).found
    assert found.shape == shape and found.confidence > 0.05


@pytest.mark.parametrize(
    ("hue", "name"),
    [
        (0.0, "red"),
        (0.96, "red"),
        (0.07, "red"),
        (0.08, "yellow"),
        (0.2, "yellow"),
        (0.24, None),
        (0.38, "green"),
        (0.5, None),
        (0.57, "blue"),
        (0.67, "blue"),
        (0.8, None),
    ],
)
def test_hues(hue, name):
    (found,) = look(_picture(Thing("circle", rgb(hue, 0.9, 0.9), 0.5, 0.5, 0.25))).found
    assert found.colour == name


def test_what_is_no_known_shape_has_no_name():
    picture = _picture(background=GREY)
    picture[30:36, 5:60] = RED
    (bar,) = look(picture).found
    assert bar.shape is None and bar.colour == "red"
    assert check(picture, Ask("single object", (Wanted(None, "red"),))).correct
    assert check(picture, Ask("colours", (Wanted("square", "red"),))).kinds == ("shape",)


def test_two_colours_that_touch_are_two_objects():
    picture = _picture(background=GREY)
    picture[10:26, 10:26], picture[10:26, 26:42] = RED, GREEN
    assert _kinds(picture) == [("square", "green", "medium"), ("square", "red", "medium")]


def test_speckles_and_faint_things_are_no_objects():
    rng = np.random.default_rng(0)
    picture = _picture(Thing("square", YELLOW, 0.5, 0.5, 0.25))
    for row, column in rng.integers(0, 62, (12, 2)):
        if not (18 < row < 46 and 18 < column < 46):
            picture[row : row + 2, column : column + 2] = RED
    picture[2:14, 2:14] = rgb(0.6, 0.25, 0.9)  # as unsaturated as a background may be
    assert _kinds(picture) == [("square", "yellow", "medium")]


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(110, 140, (64, 64, 3), dtype=np.uint8),
    ],
    ids=["black", "white", "grey noise"],
)
def test_empty_pictures(picture):
    assert look(picture).found == ()
    verdict = check(picture, Ask("single object", (Wanted("circle"),)))
    assert not verdict.correct and verdict.kinds == ("count",) and "nothing" in verdict.reason


def test_pictures_of_one_colour_and_wild_noise_show_nothing_that_was_asked():
    for picture in (
        np.full((64, 64, 3), RED, np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    ):
        assert not check(picture, Ask("single object", (Wanted("square"),))).correct


LEFT = Thing("circle", RED, 0.25, 0.5, 0.2)
RIGHT = Thing("square", GREEN, 0.75, 0.55, 0.2)


@pytest.mark.parametrize(
    ("things", "ask", "kinds"),
    [
        ([LEFT], Ask("single object", (Wanted("circle"),)), ()),
        ([LEFT], Ask("single object", (Wanted("square"),)), ("shape",)),
        ([LEFT], Ask("colours", (Wanted("circle", "blue"),)), ("colour",)),
        ([LEFT], Ask("colours", (Wanted("circle", "red", "large"),)), ("size",)),
        ([LEFT, RIGHT], Ask("single object", (Wanted("circle"),)), ("count",)),
        ([LEFT], Ask("counting", (Wanted("circle", count=2),)), ("count",)),
        ([LEFT, RIGHT], Ask("counting", (Wanted(None, count=2),)), ()),
        ([LEFT, RIGHT], Ask("two objects", (Wanted("square"), Wanted("circle"))), ()),
        ([LEFT, RIGHT], Ask("attribute binding", (Wanted("circle", "red"), Wanted("square", "green"))), ()),
        # each attribute is there, on the other object
        ([LEFT, RIGHT], Ask("attribute binding", (Wanted("circle", "green"), Wanted("square", "red"))), ("colour",)),
        ([LEFT, RIGHT], Ask("position", (Wanted("circle"), Wanted("square")), relation="left of"), ()),
        ([LEFT, RIGHT], Ask("position", (Wanted("circle"), Wanted("square")), relation="right of"), ("relation",)),
        ([LEFT, RIGHT], Ask("position", (Wanted("circle"), Wanted("square")), relation="above"), ("relation",)),
        ([LEFT, RIGHT], Ask("position", (Wanted(), Wanted()), relation="right of"), ()),  # one of them is
        ([LEFT], Ask("single object", (Wanted("circle"),), place="centre"), ("place",)),
        ([Thing("circle", RED, 0.3, 0.7, 0.2)], Ask("single object", (Wanted(),), place="bottom left"), ()),
        ([Thing("circle", RED, 0.3, 0.7, 0.2)], Ask("single object", (Wanted(),), place="top left"), ("place",)),
        ([Thing("circle", RED, 0.45, 0.55, 0.2)], Ask("single object", (Wanted(),), place="centre"), ()),
        ([LEFT], Ask("single object", (Wanted("circle"),), background="grey"), ()),
        ([LEFT], Ask("single object", (Wanted("circle"),), background="white"), ("background",)),
        ([LEFT], Ask("single object", (Wanted("square"),), background="dark"), ("shape", "background")),
    ],
)
def test_rules(things, ask, kinds):
    verdict = check(_picture(*things), ask)
    assert verdict.kinds == kinds and verdict.correct == (not kinds) and bool(verdict.reason) == bool(kinds)


def test_a_relation_needs_a_clear_offset():
    """GenEval's rule: 10 % of both boxes are taken off the offset, which must point along the axis."""
    ask = Ask("position", (Wanted(None, "red"), Wanted(None, "green")), relation="left of")
    # 0.2 of 0.36: more than half, but not after the reduction by 0.045
    diagonal = [Thing("circle", RED, 0.35, 0.3, 0.2), Thing("circle", GREEN, 0.55, 0.6, 0.2)]
    assert check(_picture(*diagonal), ask).kinds == ("relation",)
    clear = [Thing("circle", RED, 0.25, 0.3, 0.2), Thing("circle", GREEN, 0.75, 0.6, 0.2)]
    assert check(_picture(*clear), ask).correct


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((31, 64, 3), np.uint8),
        Image.new("RGB", (64, 64)),
    ],
)
def test_pictures_it_refuses(picture):
    with pytest.raises(ValueError, match="picture must"):
        check(picture, Ask("single object", (Wanted(),)))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask("counting", ()), "ask.wanted"),
        (Ask("counting", (Wanted(count=0),)), "ask.wanted"),
        (Ask("counting", (Wanted(count=8),)), "ask.wanted"),
        (Ask("position", (Wanted(), Wanted()), relation="beside"), "ask.relation"),
        (Ask("position", (Wanted(),), relation="above"), "ask.relation"),
        (Ask("single object", (Wanted(),), place="left"), "ask.place"),
        (Ask("two objects", (Wanted(count=2),), place="centre"), "ask.place"),
        (Ask("single object", (Wanted(),), background="pink"), "ask.background"),
        (Ask("single object", (Wanted("hexagon"),)), "shape"),
        (Ask("single object", (Wanted(None, "purple"),)), "colour"),
        ("a red circle", "ask must be an Ask"),
    ],
)
def test_asks_it_refuses(ask, message):
    with pytest.raises(ValueError, match=message):
        check(np.zeros((64, 64, 3), np.uint8), ask)


def test_pictures_that_are_not_square():
    picture = np.full((64, 128, 3), 200, np.uint8)
    picture[20:36, 90:106] = BLUE
    (found,) = look(picture).found
    assert (found.x, found.y) == (pytest.approx(98 / 128), pytest.approx(28 / 64))
    assert found.side == pytest.approx(16 / (64 * 128) ** 0.5, rel=0.01)


def test_the_checker_never_sees_the_renderer():
    folder = Path(shapes_checker.__file__).parent
    for name in ("shapes_checker", "classification", "segmentation", "_components"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and "training" in node.module:
                assert node.module == "dcar_fast.training.shapes.scene"
            assert not (isinstance(node, ast.Import) and any("training" in alias.name for alias in node.names))


def test_components():
    mask = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]], bool)
    labels, count = label(mask)
    assert count == 5  # diagonal neighbours are apart; the two columns on the right are joined below
    expected = [[1, 0, 2, 0, 2], [1, 0, 2, 2, 2], [1, 1, 0, 0, 0], [0, 0, 0, 3, 0], [4, 0, 0, 0, 5]]
    assert labels.tolist() == expected
    assert label(np.zeros((3, 3), bool))[1] == 0 and label(np.ones((3, 3), bool))[1] == 1


def test_components_of_a_spiral_and_of_noise():
    spiral = np.zeros((9, 9), bool)
    spiral[0], spiral[:, 8], spiral[8], spiral[2:, 0], spiral[2, :7], spiral[2:7, 6] = (True,) * 6
    assert label(spiral)[1] == 1
    mask = np.random.default_rng(0).random((40, 40)) < 0.55
    labels, count = label(mask)
    reached = np.zeros(mask.shape, bool)
    for i in range(1, count + 1):  # growing a pixel within the mask gives its component and no more
        seen = np.zeros(mask.shape, bool)
        seen[tuple(np.argwhere(labels == i)[0])] = True
        while True:
            wider = seen.copy()
            wider[1:] |= seen[:-1]
            wider[:-1] |= seen[1:]
            wider[:, 1:] |= seen[:, :-1]
            wider[:, :-1] |= seen[:, 1:]
            wider &= mask
            if (wider == seen).all():
                break
            seen = wider
        assert (seen == (labels == i)).all()
        reached |= seen
    assert (reached == mask).all()


def test_growing_and_shrinking():
    dot = np.zeros((7, 7), bool)
    dot[3, 0] = True
    grown = grow(dot, 2)
    assert grown.sum() == 15 and grown[1:6, :3].all() and dot.sum() == 1
    assert (shrink(np.ones((4, 4), bool), 1)).all()
    assert shrink(grown, 2).sum() == 1
