"""The tokenizer's stages through the training loop: overfitting, the chain of folders, continuing, refusals."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_fast.checkpoints import load_tokenizer, read_tokenizer, save_tokenizer
from dcar_fast.config import PipelineConfig
from dcar_fast.training.codebook import merge_codes
from dcar_fast.training.settings import TokenizerTraining
from dcar_fast.training.tokenizer_model import psnr
from dcar_fast.training.tokenizer_setup import make_tokenizer_task, pictures, train_tokenizer
from tests.training.tokenizer_cases import SIZE, config, dcht
from tests.training.tokenizer_cases import pictures as random_pictures

pytest.importorskip("accelerate", reason="the train extra is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four pictures: at batch size 4 every step sees them all."""
    path = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(random_pictures(4)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    return path


def settings(folder: Path, output: Path, steps: int, stage: str = "continuous", **changes) -> TokenizerTraining:
    run = {"output": str(output), "steps": steps, "batch_size": 4, "ema_decay": 0.9, "trackers": [], "log_every": 1}
    run |= {"checkpoint_every": 0, "preview_every": 0, "device": "cpu", **changes.pop("run", {})}
    values = {
        "run": run,
        "data": {"kind": "folder", "path": str(folder), "size": SIZE, "workers": 0},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "discriminator": {"learning_rate": 1e-4},
        "model": config(codebook_size=64).to_dict(),
        "stage": stage,
        "lpips_weight": 0.0,
        "residual_std_examples": 4,
        "discriminator_width": 8,
        "discriminator_layers": 1,
    }
    return TokenizerTraining.from_dict({**values, **changes})


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def quality(folder: Path, model: Path) -> dict[str, float]:
    """Mean PSNR of both paths on the folder's pictures, through the exported tokenizer."""
    loaded = load_tokenizer(model)
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))) for i in range(4)])
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        hybrid, tokens = loaded(images)
        discrete = loaded.decode_tokens(tokens.ids)
    return {"hybrid": psnr(hybrid, images).mean().item(), "discrete": psnr(discrete, images).mean().item()}


@pytest.fixture(scope="module")
def chain(folder, tmp_path_factory) -> dict[str, Path]:
    """The three stages, each from the one before: stage -> output folder."""
    root = tmp_path_factory.mktemp("chain")
    first = settings(folder, root / "continuous", 150, run={"preview_every": 150}, preview_examples=2)
    train_tokenizer(first)
    second = settings(
        folder, root / "discrete", 120, "discrete", initial=str(root / "continuous" / "model"), codebook_init="data"
    )
    train_tokenizer(second)
    third = settings(
        folder, root / "alternate", 80, "alternate", initial=str(root / "discrete" / "model"), gan_weight=0.01
    )
    train_tokenizer(third)
    return {stage: root / stage for stage in ("continuous", "discrete", "alternate")}


def test_one_batch_is_overfitted(folder, chain):
    assert quality(folder, chain["continuous"] / "model")["hybrid"] > 25
    assert lines(chain["continuous"])[0]["psnr"] < 15


def test_discrete_stage_learns_the_codes(folder, chain):
    before = quality(folder, chain["continuous"] / "model")["discrete"]
    assert quality(folder, chain["discrete"] / "model")["discrete"] > max(20, before + 3)


def test_alternate_stage_improves_the_hybrid_path_and_freezes_the_encoder(folder, chain):
    before, after = (quality(folder, chain[stage] / "model") for stage in ("discrete", "alternate"))
    assert after["hybrid"] > before["hybrid"] + 1 and after["discrete"] > 20
    states = [load_tokenizer(chain[stage] / "model").state_dict() for stage in ("discrete", "alternate")]
    for name, tensor in states[0].items():
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(tensor, states[1][name]), name
    assert not torch.equal(*(state["decoder.project_in.conv.weight"] for state in states))


def test_almost_equal_codes_are_merged_before_the_alternate_stage(folder, chain, tmp_path, caplog):
    initial = str(chain["discrete"] / "model")
    with caplog.at_level("INFO", "dcar_fast"):
        train_tokenizer(settings(folder, tmp_path, 2, "alternate", initial=initial, merge_codes=0.9))
    before, after = (load_tokenizer(path).quantizer.embedding.weight for path in (initial, tmp_path / "model"))
    left = len(torch.unique(after, dim=0))
    assert left < len(torch.unique(before, dim=0)) and f"merge_codes 0.9: {left} of 64 codes are left" in caplog.text
    expected = before.detach().clone()
    assert merge_codes(expected, 0.9) == left and torch.equal(after, expected)


def test_folders_tell_their_stage_and_residuals(chain):
    assert read_tokenizer(chain["continuous"] / "model")[1] == {"stage": "continuous"}
    details = read_tokenizer(chain["alternate"] / "model")[1]
    assert details["stage"] == "alternate" and 0 < details["residual_std"] < 0.5 and details["tokens"] == 4 * 16


def test_previews_are_drawn(chain):
    assert any(path.suffix == ".png" for path in (chain["continuous"] / "previews").rglob("*"))


@pytest.mark.parametrize("stage", ["discrete", "alternate"])
def test_a_continued_run_shows_the_same_losses(folder, chain, tmp_path, stage):
    """With all that a stage keeps besides the weights: GAN, use of codes, restarts, filling of the codebook."""
    initial = {"discrete": "continuous", "alternate": "discrete"}[stage]
    changes = {"gan_weight": 0.5, "gan_start": 1, "restart_dead_codes_after": 3, "codebook_init": "data"}
    changes["initial"] = str(chain[initial] / "model")
    whole = settings(folder, tmp_path / "whole", 8, stage, **changes)
    train_tokenizer(whole)
    part = dataclasses.replace(
        whole, run=dataclasses.replace(whole.run, output=str(tmp_path / "part"), checkpoint_every=5)
    )
    train_tokenizer(dataclasses.replace(part, run=dataclasses.replace(part.run, steps=5)))
    train_tokenizer(part)
    changing = ("per_second", "seconds", "eta", "time", "waiting")
    expected, got = (
        [{k: v for k, v in line.items() if not any(word in k for word in changing)} for line in lines(tmp_path / run)]
        for run in ("whole", "part")
    )
    assert {"loss", "psnr", "codebook_perplexity", "discriminator"} <= expected[-1].keys()
    assert got == expected
    for name, tensor in load_tokenizer(tmp_path / "whole" / "model").state_dict().items():
        assert torch.equal(tensor, load_tokenizer(tmp_path / "part" / "model").state_dict()[name]), name


def test_new_weights_depend_on_the_seed_alone(folder, tmp_path):
    def made(seed: int):
        torch.rand(seed + 1)
        return make_tokenizer_task(settings(folder, tmp_path, 1, gan_weight=1.0, run={"seed": seed}))

    first, second, other = made(1), made(1), made(2)
    for name in ("tokenizer", "discriminator"):
        states = [task.modules[name].state_dict() for task in (first, second, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_held_out_shapes_are_measured(tmp_path):
    from dcar_fast.training.shapes import ShapesSource

    data = settings(tmp_path, tmp_path, 1, data={"kind": "shapes", "size": 32, "seed": 4}).data
    found = torch.cat(list(pictures(data, 18)))
    held_out, seen = (ShapesSource(32, 4, held_out=flag) for flag in (True, False))
    assert found.shape == (18, 3, 32, 32) and found.dtype == torch.uint8
    assert np.array_equal(found[17].permute(1, 2, 0), held_out.example(17).image)
    assert not np.array_equal(found[17].permute(1, 2, 0), seen.example(17).image)


def test_a_trained_codebook_is_not_replaced(folder, chain, tmp_path, caplog):
    changes = {"codebook_init": "data", "initial": str(chain["discrete"] / "model")}
    with caplog.at_level(logging.WARNING):
        assert not make_tokenizer_task(settings(folder, tmp_path, 1, "discrete", **changes)).fill_codebook
    assert "they are trained" in caplog.text
    changes["initial"] = str(chain["continuous"] / "model")
    assert make_tokenizer_task(settings(folder, tmp_path, 1, "discrete", **changes)).fill_codebook


def test_what_does_not_fit_is_refused(folder, chain, tmp_path):
    def refused(match: str, stage: str = "discrete", **changes) -> None:
        with pytest.raises(ValueError, match=match):
            make_tokenizer_task(settings(folder, tmp_path, 1, stage, **changes))

    refused("codebook_size 64 instead of 24", initial=str(chain["continuous"] / "model"), model=config().to_dict())
    refused("'alternate' needs trained codes", "alternate", initial=str(chain["continuous"] / "model"))
    refused("is not a folder", initial=str(tmp_path / "missing"))
    refused("data.size must be a multiple of 4, .* got 18", data={"size": 18})
    refused("at least 24 for a discriminator of 3 layers, got 16", gan_weight=1.0, discriminator_layers=3)
    refused("lpips_weights: .* does not exist", lpips_weight=1.0, lpips_weights=str(tmp_path / "none.pth"))
    assert not list(tmp_path.iterdir())


# ---- folders of a tokenizer


def test_a_tokenizer_folder_keeps_weights_and_details(tmp_path):
    model = dcht()
    save_tokenizer(tmp_path / "new", model, {"residual_std": 0.25})
    loaded, details = read_tokenizer(tmp_path / "new")
    assert details == {"residual_std": 0.25} and loaded.config == model.config and not loaded.training
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_loaded_as_saved(tmp_path):
    save_tokenizer(tmp_path, dcht().to(torch.bfloat16))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decoder.project_in.conv.weight.dtype == torch.bfloat16
    assert loaded.quantizer.embedding.weight.dtype == torch.float32


def test_released_folders_are_loaded(tmp_path):
    from safetensors.torch import save_file

    from dcar_fast._release import TOKENIZER_NAMES, released_name

    model = dcht()
    state = {released_name(name, TOKENIZER_NAMES): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "dc_ht"}')
    loaded, details = read_tokenizer(tmp_path)
    assert details == {} and torch.equal(loaded.quantizer.embedding.weight, model.quantizer.embedding.weight)


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="describes no tokenizer"):
        load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, dcht())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="version 7 is not supported"):
        load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, dcht())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="another save"):
        load_tokenizer(tmp_path)


def test_pipeline_folders_are_loaded(tmp_path):
    from dcar_fast.checkpoints import save_folder
    from dcar_fast.config import DCARConfig, TextEncoderConfig
    from dcar_fast.models.dcar import DCAR

    model = dcht()
    generator = DCARConfig(
        codebook_size=24, latent_channels=8, num_tokens=4, hidden_size=8, num_layers=1, num_heads=2, mlp_hidden_size=8,
        text_length=4, text_dim=8, head_width=8, head_depth=1,
    )  # fmt: skip
    text = TextEncoderConfig("bytes", max_length=4, vocab_size=384, d_model=8)
    parts = {"tokenizer": model, "generator": DCAR(generator), "text_encoder": torch.nn.Linear(1, 1)}
    save_folder(tmp_path, parts, PipelineConfig(model.config, generator, text), trained=True)
    loaded, details = read_tokenizer(tmp_path)
    assert details == {} and torch.equal(loaded.quantizer.embedding.weight, model.quantizer.embedding.weight)
