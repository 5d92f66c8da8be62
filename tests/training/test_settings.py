"""Settings check themselves, come from YAML with the full key in every complaint, and go back to it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from dcar_fast.config import DCHTConfig
from dcar_fast.training.settings import (
    DataSettings,
    GeneratorTraining,
    OptimizerSettings,
    RunSettings,
    TokenizerTraining,
)
from dcar_fast.training.yaml_config import dump, load_recipe, parse, recipe_names, save_recipe

RUN = {"output": "out", "steps": 3, "batch_size": 4}
TOKENIZER = {"run": RUN}
ALTERNATE = TOKENIZER | {"stage": "alternate", "initial": "x"}
GENERATOR = {"run": RUN, "tokenizer": "folder"}
RECIPES = {
    "dc-ht-256-continuous",
    "dc-ht-256-discrete",
    "dc-ht-256-alternate",
    "dc-ar-256",
    "dc-ar-512",
    "shapes-tokenizer-1",
    "shapes-tokenizer-2",
    "shapes-tokenizer-3",
    "shapes-generator",
}


def kind_of(recipe: str) -> type:
    return TokenizerTraining if "tokenizer" in recipe or recipe.startswith("dc-ht") else GeneratorTraining


def test_the_recipes_there_must_be():
    assert set(recipe_names()) >= RECIPES


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_survive_a_round_trip(name, tmp_path):
    settings = load_recipe(name, kind_of(name))
    save_recipe(settings, tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml", kind_of(name)) == settings
    assert kind_of(name).from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.run.output == f"runs/{name}"  # no two write to one folder


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_of_a_recipe_is_used(name):
    """What the file says is what the settings hold: nothing is read and forgotten."""
    from importlib.resources import files

    def compare(values, settings):
        for key, value in values.items():
            found = getattr(settings, key)
            if isinstance(value, dict):
                compare(value, found)
            else:
                assert (list(found) if isinstance(found, tuple) else found) == value, key

    text = (files("dcar_fast.training") / "recipes" / f"{name}.yaml").read_text()
    compare(parse(text), load_recipe(name, kind_of(name)))


def test_published_numbers():
    """Section 5 of the specification."""
    stages = [load_recipe(f"dc-ht-256-{stage}", TokenizerTraining) for stage in ("continuous", "discrete", "alternate")]
    assert [s.stage for s in stages] == ["continuous", "discrete", "alternate"]
    assert [s.gan_weight for s in stages] == [0.0, 0.5, 0.5]
    assert [s.optimizer.learning_rate for s in stages] == [1e-4, 1e-4, 5e-5]
    assert all(s.data.size == 256 and s.lpips_weight == 1 and s.run.ema_decay == 0.999 for s in stages)
    assert stages[1].initial == f"{stages[0].run.output}/model" and stages[2].initial == f"{stages[1].run.output}/model"
    assert stages[2].gan_start == 0 < stages[1].gan_start
    small, large = load_recipe("dc-ar-256", GeneratorTraining), load_recipe("dc-ar-512", GeneratorTraining)
    assert (small.run.steps, large.run.steps, small.data.size, large.data.size) == (200_000, 50_000, 256, 512)
    assert small.optimizer == OptimizerSettings(2e-4, (0.9, 0.96), 0.03, 10_000, 1e-5, 1.0)
    assert (large.optimizer.learning_rate, large.optimizer.warmup_steps) == (1e-4, 2000)
    assert (small.label_smoothing, small.unmasked_weight, small.text_dropout) == (0.1, 0.1, 0.1)
    assert (small.run.precision, small.run.ema_decay, large.initial) == ("bfloat16", 0.9999, "runs/dc-ar-256/model")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TokenizerTraining, {"run": RUN | {"steps": 0}}, r"run\.steps must be an integer >= 1, got 0"),
        (TokenizerTraining, {"run": RUN | {"steps": True}}, r"run\.steps must be an integer >= 1, got True"),
        (TokenizerTraining, {"run": RUN | {"steps": "3"}}, r"run\.steps must be .* got '3'"),
        (
            TokenizerTraining,
            {"run": RUN | {"stepz": 1}},
            r"unknown settings \['run\.stepz'\]; known are .*'run\.steps'",
        ),
        (TokenizerTraining, {"run": {"output": "x", "steps": 1}}, r"run: missing .*'batch_size'"),
        (TokenizerTraining, {}, "missing .*'run'"),
        (
            TokenizerTraining,
            {"run": RUN | {"accumulation": 3}},
            r"run\.batch_size must be a multiple of accumulation 3",
        ),
        (TokenizerTraining, {"run": RUN | {"ema_decay": 1}}, r"run\.ema_decay must be in \[0, 1\), got 1"),
        (TokenizerTraining, {"run": RUN | {"trackers": "wandb"}}, r"run\.trackers must be a list"),
        (TokenizerTraining, {"run": RUN | {"precision": "float16"}}, r"run\.precision must be one of"),
        (TokenizerTraining, {"run": RUN | {"output": ""}}, r"run\.output must be the name of a folder"),
        (TokenizerTraining, {"run": RUN | {"threads": 0}}, r"run\.threads must be"),
        (TokenizerTraining, TOKENIZER | {"data": {"kind": "cache", "path": "x"}}, r"data\.kind must not be 'cache'"),
        (TokenizerTraining, TOKENIZER | {"data": {"kind": "folder"}}, r"data\.path must be given"),
        (TokenizerTraining, TOKENIZER | {"data": {"path": "x"}}, r"data\.path must be empty for 'shapes'"),
        (TokenizerTraining, TOKENIZER | {"data": {"size": 8}}, r"data\.size must be 16\.\.4096"),
        (TokenizerTraining, TOKENIZER | {"data": {"variety": "some"}}, r"data\.variety must be one of"),
        (
            TokenizerTraining,
            TOKENIZER | {"data": {"kind": "folder", "path": "p", "variety": "few"}},
            r"data\.variety must be 'full' where nothing is drawn",
        ),
        (TokenizerTraining, TOKENIZER | {"data": "x"}, "data must be DataSettings, got 'x'"),
        (TokenizerTraining, TOKENIZER | {"stage": "alternate"}, "initial must be given for stage 'alternate'"),
        (TokenizerTraining, TOKENIZER | {"merge_codes": 0.9}, "merge_codes must be 0 but for stage 'alternate'"),
        (TokenizerTraining, ALTERNATE | {"merge_codes": 1}, "merge_codes must be below 1"),
        (TokenizerTraining, TOKENIZER | {"optimizer": {"betas": [0.9, 1]}}, r"optimizer\.betas must be two numbers"),
        (TokenizerTraining, TOKENIZER | {"optimizer": {"clip": float("nan")}}, r"optimizer\.clip must be a finite"),
        (TokenizerTraining, TOKENIZER | {"model": "dc-ar-2"}, "model must be one of"),
        (TokenizerTraining, TOKENIZER | {"model": {"codebook_size": 0}}, r"model\.codebook_size must be a positive"),
        (TokenizerTraining, TOKENIZER | {"model": {"codes": 0}}, r"model: unknown fields \['codes'\]"),
        (TokenizerTraining, TOKENIZER | {"gan_weight": -1}, "gan_weight must be a finite number >= 0"),
        (GeneratorTraining, {"run": RUN}, "tokenizer must be the name of a folder"),
        (GeneratorTraining, GENERATOR | {"residual_scale": 0}, "residual_scale must be positive, or null"),
        (GeneratorTraining, GENERATOR | {"text_dropout": 1.5}, r"text_dropout must be in \[0, 1\]"),
        (GeneratorTraining, GENERATOR | {"model": {"generator": {"num_tokens": 5}}}, r"model\.generator\.num_tokens"),
        (GeneratorTraining, GENERATOR | {"preview_prompts": ["a", ""]}, "preview_prompts must be a list of non-empty"),
        (GeneratorTraining, [1], r"GeneratorTraining must be a mapping of fields, got \[1\]"),
    ],
)
def test_what_does_not_fit_is_named_by_its_full_key(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind.from_dict(values)


def test_nested_dicts_become_settings():
    made = TokenizerTraining.from_dict(
        TOKENIZER | {"model": {"codebook_size": 64}, "optimizer": {"betas": [0.8, 0.9]}, "data": {"size": 32}}
    )
    assert made.model == DCHTConfig(codebook_size=64) and made.optimizer.betas == (0.8, 0.9)
    assert made.data == DataSettings(size=32) and made.run == RunSettings("out", 3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.stage = "discrete"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", ".1e-3", "+1e-4"])
def test_yaml_numbers(text):
    assert parse(f"x: {text}") == {"x": 1e-4}


@pytest.mark.parametrize("text", ["1e4x", "'1e-4'", "e5", "1e", "1e-4-5"])
def test_yaml_texts_that_look_like_numbers(text):
    assert parse(f"x: {text}") == {"x": text.strip("'")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "the key 'a' comes twice"),
        ("run: {steps: 1, steps: 2}", "the key 'steps' comes twice"),
        ("a: [1", "not YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_bad_yaml(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_recipe_errors_name_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {output: x, steps: 1e1, batch_size: 4}")
    with pytest.raises(ValueError, match=r"mine\.yaml: run\.steps must be an integer >= 1, got 10\.0"):
        load_recipe(path, TokenizerTraining)
    with pytest.raises(ValueError, match=r"config must be a YAML file or one of \(.*'dc-ar-256'.*got 'dc-ar'"):
        load_recipe("dc-ar", GeneratorTraining)
    with pytest.raises(ValueError, match=r"recipe shapes-generator: unknown settings"):
        load_recipe("shapes-generator", TokenizerTraining)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file"):
        load_recipe(path, TokenizerTraining)


def test_dump_is_plain_yaml():
    text = dump(GeneratorTraining.from_dict(GENERATOR))
    assert "!!python" not in text and parse(text)["run"]["output"] == "out"


def test_settings_load_no_optional_package():
    code = (
        "import sys, dcar_fast, dcar_fast.training.settings, dcar_fast.training.yaml_config, dcar_fast.training.loop\n"
        "print(sorted({'accelerate', 'yaml', 'webdataset', 'tensorboard', 'torchmetrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
