"""Prompt files of MJHQ-30K and GenEval, and the folders that their tools read."""

import json
import os
import re

import pytest
from PIL import Image

from dcar_fast import DCARPipeline
from dcar_fast.bulk.ranks import Rank
from dcar_fast.evaluation.prompt_files import draw_geneval, draw_mjhq, read_geneval, read_mjhq
from dcar_fast.evaluation.settings import GenevalImages, MjhqImages

MJHQ = {
    "a1": {"category": "animals", "prompt": "a cat"},
    "b2": {"category": "art", "prompt": "a drawing of a cat", "extra": 1},
    "c3": {"category": "animals", "prompt": "a dog, très petit"},
}
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]
FAST = {"num_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipeline():
    return DCARPipeline.from_preset("shapes", seed=1)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "meta_data.json").write_text(json.dumps(MJHQ))
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    return tmp_path


def _as_geneval_reads(folder):
    """The walk of GenEval's evaluate_images.py: (metadata, sorted names of the samples) by folder."""
    found = {}
    for subfolder in sorted(os.listdir(folder)):
        path = folder / subfolder
        if not path.is_dir() or not subfolder.isdigit():
            continue
        names = [n for n in sorted(os.listdir(path / "samples")) if re.match(r"\d+\.png", n)]
        found[subfolder] = (json.loads((path / "metadata.jsonl").read_text()), names)
    return found


def test_mjhq(pipeline, files):
    prompts = read_mjhq(files / "meta_data.json")
    assert [(p.id, p.category) for p in prompts] == [("a1", "animals"), ("b2", "art"), ("c3", "animals")]
    reports = draw_mjhq(pipeline, prompts, files / "out", seed=7, **FAST)
    assert [(r.made, r.complete) for r in reports] == [(2, True), (1, True)]
    pictures = sorted(p.relative_to(files / "out").as_posix() for p in (files / "out").rglob("*.png"))
    assert pictures == ["animals/a1.png", "animals/c3.png", "art/b2.png"]
    info = Image.open(files / "out" / "animals" / "c3.png").info
    assert (info["prompt"], info["seed"]) == ("a dog, très petit", "9")  # by its place in the file
    (files / "out" / "animals" / "a1.png").unlink()
    assert [r.made for r in draw_mjhq(pipeline, prompts, files / "out", seed=7, **FAST)] == [1, 0]


def test_geneval(pipeline, files):
    rows = read_geneval(files / "evaluation_metadata.jsonl")
    report = draw_geneval(pipeline, rows, files / "out", samples=3, seed=5, **FAST)
    assert report.complete and report.made == 6
    names = ["0000.png", "0001.png", "0002.png"]
    assert _as_geneval_reads(files / "out") == {"00000": (GENEVAL[0], names), "00001": (GENEVAL[1], names)}
    infos = [Image.open(files / "out" / "00001" / "samples" / name).info for name in names]
    assert [(i["seed"], i["prompt"]) for i in infos] == [(str(8 + k), GENEVAL[1]["prompt"]) for k in range(3)]
    (files / "out" / "images" / "00001-0002.png").unlink()
    (files / "out" / "00000" / "samples" / "0001.png").unlink()
    again = draw_geneval(pipeline, rows, files / "out", samples=3, seed=5, **FAST)
    assert again.made == 1 and again.complete and len(_as_geneval_reads(files / "out")["00000"][1]) == 3


def test_geneval_on_several_processes(pipeline, files):
    """The tree is made when the last one is done, not before."""
    rows = read_geneval(files / "evaluation_metadata.jsonl")
    first = draw_geneval(pipeline, rows, files / "out", samples=2, rank=Rank(0, 2), **FAST)
    assert not first.complete and not _as_geneval_reads(files / "out")
    assert draw_geneval(pipeline, rows, files / "out", samples=2, rank=Rank(1, 2), **FAST).complete
    assert [len(names) for _, names in _as_geneval_reads(files / "out").values()] == [2, 2]


def test_geneval_without_hard_links(pipeline, files, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("dcar_fast.evaluation.prompt_files.os.link", refuse)
    draw_geneval(pipeline, read_geneval(files / "evaluation_metadata.jsonl"), files / "out", samples=1, **FAST)
    image = files / "out" / "00000" / "samples" / "0000.png"
    assert image.read_bytes() == (files / "out" / "images" / "00000-0000.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no prompts"),
        ('{"a": {"prompt": "x"}}', "'a' must be an object"),
        ('{"a": {"category": "art", "prompt": " "}}', "'a' must be an object"),
        ('{"a": "x"}', "'a' must be an object"),
        ('{"a": {"category": "../art", "prompt": "x"}}', "category of 'a'"),
        ("[1]", "JSON object"),
        ("{", "no valid JSON"),
    ],
)
def test_files_that_are_no_mjhq(tmp_path, text, message):
    (tmp_path / "meta_data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mjhq(tmp_path / "meta_data.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ('{"prompt": "x"}\n{"tag": 1}', "line 2 must be an object"),
        ('{"prompt": "x"}\n\n{"prompt"', "line 3 is no JSON"),
        ('{"prompt": " "}', "line 1 must be"),
    ],
)
def test_files_that_are_no_geneval(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_geneval(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_geneval(tmp_path / "absent.jsonl")


def test_ids_that_would_leave_the_folder_are_refused(pipeline, tmp_path):
    (tmp_path / "meta_data.json").write_text('{"../a": {"category": "art", "prompt": "x"}}')
    with pytest.raises(ValueError, match="names"):
        draw_mjhq(pipeline, read_mjhq(tmp_path / "meta_data.json"), tmp_path / "out", **FAST)
    with pytest.raises(ValueError, match="samples"):
        draw_geneval(pipeline, GENEVAL, tmp_path / "out", samples=0)


def test_the_commands(files, capsys):
    MjhqImages(prompts=files / "meta_data.json", output=files / "m", limit=1).run()
    GenevalImages(prompts=files / "evaluation_metadata.jsonl", output=files / "g", limit=1, samples=2).run()
    assert [p.name for p in (files / "m").rglob("*.png")] == ["a1.png"]
    assert list(_as_geneval_reads(files / "g")) == ["00000"] and "wrote 2 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"GenevalImages\.samples"):
        GenevalImages(prompts=files / "x", output=files / "g", samples=0)
    with pytest.raises(ValueError, match=r"MjhqImages\.limit"):
        MjhqImages(prompts=files / "x", output=files / "g", limit=0)
