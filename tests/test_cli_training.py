"""The commands that train and cache: recipes give the defaults, flags override them, errors are clear."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dcar_fast._sampling_options import SamplingOptions
from dcar_fast.checkpoints import save_tokenizer
from dcar_fast.cli import main
from dcar_fast.evaluation.settings import (
    FidEvaluation,
    GenevalImages,
    MjhqImages,
    ReconstructionEvaluation,
    ShapesEvaluation,
)
from dcar_fast.training.settings import GeneratorModel, GeneratorTraining, TokenizerTraining
from dcar_fast.training.yaml_config import load_recipe, recipe_names
from tests.training.tiny_generator import GENERATOR, TEXT, models

NEEDED = ["--run.output", "out", "--run.steps", "5", "--run.batch-size", "4"]


@pytest.fixture
def trained(monkeypatch):
    """The settings that reach the trainers, which do nothing."""
    from dcar_fast.cli import train

    found = []
    for command in (train.TrainGenerator, train.TrainTokenizer):
        monkeypatch.setattr(command, "train", lambda self, settings: found.append(settings))
    return found


def recipe(path, **changes) -> str:
    """A YAML file; JSON is YAML."""
    values = {"run": {"output": "from-yaml", "steps": 7, "batch_size": 6}, "data": {"size": 32}, **changes}
    path.write_text(json.dumps(values))
    return str(path)


def test_flags_alone(trained):
    args = ["--tokenizer", "t", "--model", "dc-ar-256", "--data.size", "256", "--residual-scale", "0.2"]
    args += ["--preview-prompts", "a red circle", "b", "--optimizer.betas", "0.8", "0.9", "--run.no-resume"]
    assert main(["train-generator", *NEEDED, *args]) == 0
    (settings,) = trained
    assert type(settings) is GeneratorTraining, "not the parser's class"
    expected = {
        "run": {"output": "out", "steps": 5, "batch_size": 4, "resume": False},
        "data": {"size": 256},
        "optimizer": {"betas": (0.8, 0.9)},
        "tokenizer": "t",
        "model": "dc-ar-256",
        "residual_scale": 0.2,
        "preview_prompts": ("a red circle", "b"),
    }
    assert settings == GeneratorTraining.from_dict(expected)
    assert main(["train-tokenizer", *NEEDED, "--stage", "alternate", "--initial", "before", "--gan-weight", "0.5"]) == 0
    assert type(trained[1]) is TokenizerTraining and trained[1].stage == "alternate" and trained[1].gan_weight == 0.5


def test_a_recipe_gives_the_defaults_and_flags_override(trained, tmp_path):
    path = recipe(tmp_path / "a.yaml", tokenizer="t", text_dropout=0.3, model="dc-ar-512", preview_prompts=["x y", "z"])
    assert main(["train-generator", "--config", path]) == 0
    assert main(["train-generator", f"--config={path}", "--run.steps", "9", "--model", "shapes"]) == 0
    first, second = trained
    assert first.run.output == "from-yaml" and first.run.steps == 7 and first.data.size == 32
    assert first.text_dropout == 0.3 and first.model == "dc-ar-512" and first.preview_prompts == ("x y", "z")
    assert second.run.steps == 9 and second.run.batch_size == 6 and second.model == "shapes"


def test_a_recipe_with_the_models_fields(trained, tmp_path):
    model = {"generator": GENERATOR.to_dict(), "text": TEXT.to_dict()}
    path = recipe(tmp_path / "a.yaml", tokenizer="t", model=model)
    assert main(["train-generator", "--config", path, "--model.generator.num-layers", "3"]) == 0
    (settings,) = trained
    assert type(settings.model) is GeneratorModel and settings.model.text == TEXT
    assert settings.model.generator.num_layers == 3 and settings.model.generator.hidden_size == GENERATOR.hidden_size


def test_help_lists_every_setting(tmp_path, capsys):
    path = recipe(tmp_path / "a.yaml", tokenizer="t", text_dropout=0.325)
    for args in (["train-generator"], ["train-tokenizer"], ["cache"], ["train-generator", "--config", path]):
        with pytest.raises(SystemExit) as stop:
            main([*args, "--help"])
        assert stop.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        if args[0] == "cache":
            assert "--residual-dtype {float32,float16}" in out and "--data.path" in out
            continue
        for flag in (
            "--config",
            "--run.output",
            "--run.trackers",
            "--data.kind",
            "--optimizer.warmup-steps",
            "--model",
        ):
            assert flag in out, flag
    assert "0.325" in out, "the recipe's values are shown"


@pytest.mark.parametrize(
    "content, message",
    [
        ("run: [1, 2", "YAML"),
        ("just words", "mapping"),
        ("run: {output: o, steps: 5, batch_size: 2, stepz: 1}\ntokenizer: t", "run.stepz"),
        ("colour: red", "colour"),
        ("run: {output: o, steps: -5, batch_size: 2}\ntokenizer: t", "run.steps must be an integer >= 1, got -5"),
        ("run: {output: o, steps: five, batch_size: 2}\ntokenizer: t", "run.steps must be an integer"),
        ("tokenizer: t", "run"),
    ],
)
def test_bad_recipes(trained, tmp_path, capsys, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert main(["train-generator", "--config", str(path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dcar-fast: error:")]
    assert len(lines) == 1 and message in lines[0] and not trained


def test_recipes_that_are_not_there(trained, capsys):
    for args, message in (
        (["--config", "no-such-recipe"], "no-such-recipe"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--config"], "--config must be followed by"),
        (["--config", "--run.steps", "3"], "--config must be followed by"),
    ):
        assert main(["train-generator", *args]) == 2
        assert message in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize(
    "args, message",
    [
        (["train-generator", *NEEDED], "error: tokenizer must be the name of a folder"),
        (["train-generator", *NEEDED, "--tokenizer", "t", "--model", "nonsense"], "model must be one of"),
        (["train-generator", "--tokenizer", "t"], "--run.output"),
        (
            ["train-generator", *NEEDED, "--tokenizer", "t", "--run.steps", "0"],
            "error: run.steps must be an integer",
        ),
        (["train-tokenizer", *NEEDED, "--optimizer.clip", "-1"], "error: optimizer.clip must be a finite number"),
        (
            ["cache", "--tokenizer", "t", "--output", "o", "--data.size", "3"],
            "error: data.size must be 16..4096",
        ),
        (
            ["evaluate", "reconstruction", "--tokenizer", "t", "--batch-size", "0"],
            "error: batch_size must be a positive",
        ),
        (["train-tokenizer", *NEEDED, "--stage", "fourth"], "fourth"),
        (["cache"], "--tokenizer"),
    ],
)
def test_bad_flags(trained, capsys, args, message):
    try:
        status = main(args)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    text = " ".join((captured.err + captured.out).replace("│", " ").split())
    assert status == 2 and message in text and not trained


def test_folders_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train-generator", *NEEDED, "--tokenizer", "/none"]) == 2
    assert "dcar-fast: error: tokenizer: /none is not a folder" in capsys.readouterr().err
    save_tokenizer("tokenizer", models()[0])
    args = ["cache", "--tokenizer", "tokenizer", "--output", "cache"]
    assert main([*args, "--data.kind", "folder", "--data.path", "pictures", "--data.size", "16"]) == 2
    assert "'pictures'" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_missing_packages_are_named(monkeypatch, capsys):
    from dcar_fast.cli import train

    def needs(package):
        def fail(self, settings):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        return fail

    args = ["train-generator", *NEEDED, "--tokenizer", "t"]
    monkeypatch.setattr(train.TrainGenerator, "train", needs("webdataset.filters"))
    assert main(args) == 2
    assert (
        "No module named 'webdataset.filters'; install the extra: pip install -e '.[train]'" in capsys.readouterr().err
    )
    monkeypatch.setattr(train.TrainGenerator, "train", needs("something_of_ours"))
    with pytest.raises(ModuleNotFoundError):
        main(args)


def test_a_loss_that_is_no_number_is_one_line(monkeypatch, capsys):
    from dcar_fast.cli import train

    class NonFiniteLoss(RuntimeError):
        pass

    def fail(self, settings):
        raise NonFiniteLoss("step 5: the loss is nan")

    monkeypatch.setattr(train.TrainGenerator, "train", fail)
    assert main(["train-generator", *NEEDED, "--tokenizer", "t"]) == 1
    assert capsys.readouterr().err == "dcar-fast: error: step 5: the loss is nan\n"


def test_cache_writes_and_goes_on(tmp_path, capsys):
    save_tokenizer(tmp_path / "tokenizer", models()[0])
    args = ["cache", "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "cache")]
    args += ["--data.size", "16", "--data.workers", "0", "--batch-size", "2", "--device", "cpu"]
    assert main(args) == 2
    assert "examples must be given with data.kind 'shapes'" in capsys.readouterr().err
    for count in (3, 5):
        assert main([*args, "--examples", str(count)]) == 0
        assert f"cache: {count} examples, residual standard deviation 0." in capsys.readouterr().out
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["count"] == 5 and index["complete"] and index["text_encoder"] is None


def test_help_loads_neither_torch_nor_accelerate():
    import subprocess

    code = (
        "import sys\nfrom dcar_fast.cli import main\ntry:\n    main(['train-generator', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'accelerate', 'webdataset', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout[-300:] + result.stderr


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package(trained, name):
    """By its name alone; those with a tokenizer's stage are of train-tokenizer."""
    command = "train-generator" if "dc-ar" in name or name.endswith("generator") else "train-tokenizer"
    assert main([command, "--config", name]) == 0
    kind = GeneratorTraining if command == "train-generator" else TokenizerTraining
    assert trained == [load_recipe(name, kind)]
    other = {"train-generator": "train-tokenizer", "train-tokenizer": "train-generator"}[command]
    assert main([other, "--config", name]) == 2


def test_evaluations_get_their_flags(monkeypatch):
    found = []
    for kind in (ReconstructionEvaluation, ShapesEvaluation, FidEvaluation, MjhqImages, GenevalImages):
        monkeypatch.setattr(kind, "run", lambda self: found.append(self))
    sampled = ["--num-steps", "6", "--guidance-scale", "2"]
    for args in (
        ["reconstruction", "--tokenizer", "t", "--count", "5"],
        ["shapes", "--model", "m", "--count", "7", *sampled],
        ["fid", "--real", "a", "--generated", "b", "--inception", "c"],
        ["mjhq", "--prompts", "p", "--output", "o", *sampled],
        ["geneval", "--prompts", "p", "--output", "o", "--samples", "2", "--limit", "3"],
    ):
        assert main(["evaluate", *args]) == 0
    sampling = SamplingOptions(num_steps=6, guidance_scale=2.0)
    assert found == [
        ReconstructionEvaluation(tokenizer="t", count=5),
        ShapesEvaluation(model="m", count=7, sampling=sampling),
        FidEvaluation(real="a", generated="b", inception="c"),
        MjhqImages(prompts=Path("p"), output=Path("o"), sampling=sampling),
        GenevalImages(prompts=Path("p"), output=Path("o"), samples=2, limit=3),
    ]


def test_evaluate_measures_a_tokenizer(tmp_path, capsys):
    save_tokenizer(tmp_path / "tokenizer", models()[0])
    args = ["evaluate", "reconstruction", "--tokenizer", str(tmp_path / "tokenizer"), "--size", "16", "--count", "4"]
    assert main([*args, "--output", str(tmp_path / "report.json")]) == 0
    assert "hybrid" in capsys.readouterr().out and json.loads((tmp_path / "report.json").read_text())["pictures"] == 4
    assert main([*args[:-2], "--size", "18"]) == 2
    assert "size must be a multiple of" in capsys.readouterr().err
    assert main(["evaluate", "fid", "--real", str(tmp_path), "--generated", "b", "--inception", "/none.pth"]) == 2
    assert "/none.pth" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "out/a"), SafetensorError("No space left")])
def test_a_full_disk_is_one_line(monkeypatch, capsys, error):
    from dcar_fast.cli import train

    def fail(self, settings):
        raise error

    monkeypatch.setattr(train.TrainGenerator, "train", fail)
    assert main(["train-generator", *NEEDED, "--tokenizer", "t"]) == 1
    assert capsys.readouterr().err == f"dcar-fast: error: {error}\n"
