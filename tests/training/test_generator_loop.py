"""The generator's training from end to end: the command line, the loop, resuming, several processes, a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcar_fast import DCARPipeline
from dcar_fast.checkpoints import save_tokenizer
from dcar_fast.cli import main
from dcar_fast.config import SamplingConfig
from dcar_fast.training.cache import make_cache
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.generator_setup import train_generator
from dcar_fast.training.settings import GeneratorTraining
from tests.training.tiny_generator import GENERATOR, TEXT, models

MUON = {"learning_rate": 1e-3, "warmup_steps": 2, "method": "muon"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    save_tokenizer(folder / "tokenizer", models()[0])
    return folder


def settings(root: Path, output: Path, steps: int = 6, **changes) -> GeneratorTraining:
    run = {"output": str(output), "steps": steps, "batch_size": 8, "log_every": 1, "preview_every": 0, "trackers": []}
    run |= {"checkpoint_every": 3, "device": "cpu", "ema_decay": 0.9, **changes.pop("run", {})}
    values = {
        "run": run,
        "data": {"size": 16, "workers": 0},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "tokenizer": str(root / "tokenizer"),
        "model": {"generator": GENERATOR.to_dict(), "text": TEXT.to_dict()},
        "residual_examples": 40,
        "preview_prompts": ["a red circle"],
    }
    return GeneratorTraining.from_dict({**values, **changes})


def history(output: Path, names=("loss", "token_loss", "diffusion_loss", "gradient_norm")) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **{name: line[name] for name in names}} for line in lines]


@pytest.fixture(scope="module")
def whole(root):
    """An uninterrupted run of six steps."""
    output = root / "whole"
    train_generator(settings(root, output, run={"preview_every": 3}))
    return output


def test_a_run_leaves_a_model_previews_and_metrics(root, whole):
    found = history(whole, ("loss", "token_loss", "diffusion_loss", "gradient_norm", "masked_accuracy"))
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == pytest.approx(line["token_loss"] + line["diffusion_loss"]) for line in found)
    previews = sorted((whole / "previews").iterdir())
    assert len(previews) == 2 and Image.open(previews[0]).size == (140, 204)
    pipeline = DCARPipeline.from_pretrained(whole / "model")
    assert pipeline.trained and pipeline.generator.config.head_scale != GENERATOR.head_scale, "measured"
    image = pipeline(["a red circle"], seed=0, progress=False)[0]
    assert image.size == (16, 16)


def test_a_resumed_run_shows_the_same_losses(root, whole, tmp_path, monkeypatch):
    train_generator(settings(root, tmp_path, steps=3))
    first = DCARPipeline.from_pretrained(tmp_path / "model").generator.config.head_scale
    monkeypatch.setattr("dcar_fast.training.generator.residual_scale", lambda _: pytest.fail("measured twice"))
    torch.manual_seed(99)
    train_generator(settings(root, tmp_path))
    assert history(tmp_path) == history(whole)
    resumed, expected = (load_file(folder / "model" / "generator.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())
    assert DCARPipeline.from_pretrained(tmp_path / "model").generator.config.head_scale == first


def test_the_exported_model_samples_as_the_recipe_says(root, whole, tmp_path):
    """That may be changed at any time: nothing that is trained depends on it."""
    train_generator(settings(root, tmp_path, steps=3))
    train_generator(settings(root, tmp_path, sampling={"num_steps": 5, "guidance_scale": 1.5}))
    assert history(tmp_path) == history(whole)
    found = [DCARPipeline.from_pretrained(folder / "model").sampling for folder in (tmp_path, whole)]
    assert found == [SamplingConfig(num_steps=5, guidance_scale=1.5), SamplingConfig()]


def test_the_exported_weights_are_the_averages(root, tmp_path):
    folders = [tmp_path / "slow", tmp_path / "none"]
    for folder, decay in zip(folders, (0.9, 0.0), strict=True):
        train_generator(settings(root, folder, steps=4, run={"ema_decay": decay}))
    slow, none = (load_file(folder / "model" / "generator.safetensors") for folder in folders)
    assert history(folders[0]) == history(folders[1]), "the averages do not touch the training"
    assert not torch.equal(slow["to_logits.weight"], none["to_logits.weight"])
    encoders = [load_file(folder / "model" / "text_encoder.safetensors") for folder in folders]
    assert not torch.equal(encoders[0]["t5.shared.weight"], encoders[1]["t5.shared.weight"]), "the encoder has one too"


def close(a, b) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-5)


def test_accumulation_gives_the_same_losses(root, whole, tmp_path):
    train_generator(settings(root, tmp_path, run={"accumulation": 4}))
    close(history(tmp_path), history(whole))


@pytest.fixture(scope="module")
def whole_muon(root):
    output = root / "whole_muon"
    train_generator(settings(root, output, optimizer=MUON))
    return output


def test_a_resumed_run_with_muon_shows_the_same_losses(root, whole, whole_muon, tmp_path):
    train_generator(settings(root, tmp_path, steps=3, optimizer=MUON))
    train_generator(settings(root, tmp_path, optimizer=MUON))
    assert history(tmp_path) == history(whole_muon) != history(whole)
    with pytest.raises(ValueError, match="optimizer.method 'muon' -> 'adamw'"):
        train_generator(settings(root, tmp_path))


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("run", [{"accumulation": 2}, {"parallel": "fsdp2"}], ids=["accumulated", "sharded"])
def test_two_processes_give_the_same_losses(root, whole, whole_muon, tmp_path, run, method):
    """torchrun on the command line, with a recipe; the text encoder is trained along."""
    recipe, optimizer = tmp_path / "recipe.yaml", {**MUON, "method": method}
    recipe.write_text(json.dumps(settings(root, tmp_path / "out", run=run, optimizer=optimizer).to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dcar_fast", "train-generator", "--config", str(recipe)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        errors = launched.communicate(timeout=120)[1]
    finally:
        launched.terminate()  # it ends its processes then; one that is killed would leave them behind
    assert launched.returncode == 0, errors[-2000:]
    close(history(tmp_path / "out"), history({"adamw": whole, "muon": whole_muon}[method]))
    assert DCARPipeline.from_pretrained(tmp_path / "out" / "model").trained


def test_training_from_a_cache(root, tmp_path):
    data = {"size": 16, "workers": 0}
    values = {"output": str(tmp_path / "cache"), "tokenizer": str(root / "tokenizer"), "data": data, "examples": 24}
    index = make_cache(CacheSettings.from_dict(values))
    cached = {"kind": "cache", "path": str(tmp_path / "cache"), "workers": 0}
    report = train_generator(settings(root, tmp_path / "out", data=cached))
    assert report.step == 6 and all(line["loss"] < 10 for line in history(tmp_path / "out"))
    scale = DCARPipeline.from_pretrained(tmp_path / "out" / "model").generator.config.head_scale
    assert scale == pytest.approx(index.residual_std)


def test_bfloat16_is_close_to_float32(root, whole, tmp_path):
    train_generator(settings(root, tmp_path, run={"precision": "bfloat16"}))
    for low, full in zip(history(tmp_path, ("loss",)), history(whole, ("loss",)), strict=True):
        assert low["loss"] == pytest.approx(full["loss"], rel=0.02) and low["loss"] != full["loss"]
    model = load_file(tmp_path / "model" / "generator.safetensors")
    assert model["to_logits.weight"].dtype == torch.float32


def test_the_command_line_trains_and_refuses(root, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings(root, tmp_path / "out", steps=2).to_dict()))
    assert main(["train-generator", "--config", str(recipe), "--run.batch-size", "4"]) == 0
    assert len(history(tmp_path / "out")) == 2
    assert main(["train-generator", "--config", str(recipe), "--run.batch-size", "8", "--run.steps", "3"]) == 2
    assert "batch_size" in capsys.readouterr().err
    assert main(["train-generator", "--config", str(recipe), "--data.size", "64"]) == 2
    assert "data.size must be 16" in capsys.readouterr().err
