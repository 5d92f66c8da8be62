"""ShapesEval: scores and intervals, the report's files, the validation of the checker, pictures from folders."""

import json

import numpy as np
import pytest
from PIL import Image

from dcar_fast.evaluation.contact_sheet import contact_sheet
from dcar_fast.evaluation.settings import ShapesEvaluation
from dcar_fast.evaluation.shapes_eval import Score, judge_pictures, picture_files, read_picture
from dcar_fast.evaluation.shapes_validation import shuffled, validate
from dcar_fast.training.shapes import Prompt, Wanted, held_out_prompts, render_prompt
from dcar_fast.training.shapes.scene import CATEGORIES, Ask

PROMPTS = held_out_prompts(12, seed=3)


@pytest.fixture(scope="module")
def pictures():
    return [render_prompt(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # the values of E. B. Wilson's formula, from statsmodels' proportion_confint
        (10, 10, 0.7225, 1.0),
        (540, 600, 0.8734, 0.9216),
        (1, 2, 0.0945, 0.9055),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals(correct, total, low, high):
    assert Score(correct, total).interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_scores_by_category(pictures, tmp_path):
    spoilt = [np.full_like(p, 128) if i in (0, 6, 7) else p for i, p in enumerate(pictures)]
    report = judge_pictures(PROMPTS, spoilt)
    assert [j.index for j in report.failures] == [0, 6, 7] and report.kinds == {"count": 3}
    assert (report.overall.correct, report.overall.total) == (9, 12)
    assert [report.categories[name].correct for name in CATEGORIES] == [0, 1, 2, 2, 2, 2]
    report.write(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["overall"]["rate"] == 0.75 and values["categories"]["single object"]["total"] == 2
    assert values["pictures"][7] == {
        "index": 7,
        "prompt": PROMPTS[7].text,
        "category": "two objects",
        "correct": False,
        "kinds": ["count"],
        "reason": report.judged[7].reason,
    }
    assert "overall" in report.table() and "75.0%" in report.table() and "count 3" in report.table()


@pytest.mark.parametrize("count", [11, 13])
def test_too_few_and_too_many_pictures(pictures, count):
    with pytest.raises(ValueError, match="pictures: "):
        judge_pictures(PROMPTS, (pictures * 2)[:count])
    with pytest.raises(ValueError, match="prompts"):
        judge_pictures([], [])


def test_validation_of_the_checker():
    found = validate(count=120, seed=1)
    assert found.true.overall.rate >= 0.99
    assert found.chance.rate < 0.05 and found.chance.total == 1200 and set(found.shuffled) == set(CATEGORIES)
    # vague prompts are sometimes met by chance, exact ones hardly ever
    assert max(found.shuffled[name].rate for name in ("position", "attribute binding")) < 0.05
    assert found.spoilt["as drawn"].rate >= 0.99 and found.spoilt["blur 0.7 px"].rate >= 0.97
    for table in found.confusions["JPEG 60"].values():
        assert len({sum(counts.values()) for counts in table.values()}) == 1  # each name was drawn as often
    assert json.loads(json.dumps(found.to_dict()))["shuffled"]["overall"]["total"] == 1200
    assert "level of chance" in found.table()
    with pytest.raises(ValueError, match="count"):
        validate(count=1)


def test_shuffling_judges_by_other_prompts():
    """Two prompts that exclude each other: every own picture is right, every other one is wrong."""
    asks = [Ask("colours", (Wanted("circle", colour),)) for colour in ("red", "green")]
    prompts = [Prompt(ask.wanted[0].colour, ask) for ask in asks]
    pictures = [render_prompt(prompt) for prompt in prompts]
    assert judge_pictures(prompts, pictures).overall.rate == 1
    assert shuffled(prompts, pictures)["colours"] == Score(0, 2)
    assert shuffled([prompts[0]] * 3, [pictures[0]] * 3)["colours"] == Score(6, 6)


def _save(pictures, folder):
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:05d}.png")


def test_a_folder_of_pictures_is_judged(pictures, tmp_path, capsys):
    _save([*pictures[:11], np.zeros_like(pictures[0])], tmp_path / "mine")
    settings = ShapesEvaluation(images=str(tmp_path / "mine"), output=tmp_path / "out", count=12, seed=3)
    report = settings.run()
    assert [j.index for j in report.failures] == [11]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"]["correct"] == 11
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert json.loads(lines[4]) == {"prompt": PROMPTS[4].text, "category": "position"}
    assert Image.open(tmp_path / "out" / "failures.png").width > 200
    assert "91.7%" in capsys.readouterr().out
    _save(pictures[11:], tmp_path / "last")
    (tmp_path / "last" / "00000.png").rename(tmp_path / "mine" / "00011.png")
    assert settings.run().overall.rate == 1
    assert not (tmp_path / "out" / "failures.png").exists()  # that of the run before


def test_pictures_of_other_prompts_are_refused(pictures, tmp_path):
    _save(pictures, tmp_path)
    assert len(picture_files(tmp_path, PROMPTS)) == 12
    rows = [{"file_name": f"{i:05d}.png", "prompt": p.text} for i, p in enumerate(PROMPTS)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(picture_files(tmp_path, PROMPTS)) == 12
    with pytest.raises(ValueError, match="seed and count"):
        picture_files(tmp_path, held_out_prompts(12, seed=4))
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        picture_files(tmp_path, PROMPTS)
    (tmp_path / "00003.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 12 pictures, the first is 00003\.png"):
        picture_files(tmp_path, PROMPTS)
    (tmp_path / "00000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00000\.png"):
        read_picture(tmp_path / "00000.png")


def test_a_model_draws_and_goes_on(tmp_path, capsys):
    settings = ShapesEvaluation(output=tmp_path, count=3, batch_size=3, seed=4)
    first = settings.run()
    (tmp_path / "images" / "00001.png").unlink()
    assert settings.run() == first and "wrote 1 images" in capsys.readouterr().out
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    assert prompts == [p.text for p in held_out_prompts(3, 4)]
    assert [Image.open(tmp_path / "images" / f"0000{i}.png").info["seed"] for i in range(3)] == ["4", "5", "6"]


def test_validate_writes_its_report(tmp_path, capsys):
    ShapesEvaluation(output=tmp_path, count=6, validate=True, size=32).run()
    assert json.loads((tmp_path / "validation.json").read_text())["true"]["overall"]["total"] == 6
    assert "true renders" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"seed": -1},
        {"batch_size": 2.5},
        {"output": ""},
        {"model": ""},
        {"engine": "turbo"},
        {"dtype": "int8"},
        {"validate": True, "images": "somewhere"},
    ],
)
def test_settings_it_refuses(wrong):
    with pytest.raises(ValueError, match=f"ShapesEvaluation.({'|'.join(wrong)}) must be"):
        ShapesEvaluation(**wrong)


def test_contact_sheets():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32] = (255, 0, 0)
    sheet = contact_sheet([(picture, "a prompt — with a dash", "wrong " * 60)] * 7)
    assert sheet.size == (6 * 216 + 12, 2 * 244 + 12)
    pixels = np.array(sheet)
    assert (pixels[12 : 12 + 64, 12 : 12 + 128] == (255, 0, 0)).all()  # magnified by 2, and in its place
    with pytest.raises(ValueError, match="entries"):
        contact_sheet([])
