"""From settings to the generator's task: presets, folders, caches, continuation, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from dcar_fast import DCARPipeline
from dcar_fast.checkpoints import save_tokenizer
from dcar_fast.training.cache import make_cache
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.generator_setup import calibration_batches, make_generator_task
from tests import tiny_t5
from tests.training.tiny_generator import GENERATOR, TEXT, PlainRun, models, settings, task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of a tokenizer, a T5 encoder, an exported generator, and a cache of eight pictures."""
    folder = tmp_path_factory.mktemp("root")
    save_tokenizer(folder / "tokenizer", models()[0])
    tiny_t5.save(folder / "t5", d_model=16)
    made = task()
    PlainRun(made).train(1)
    made.export(folder / "export")
    data = {"size": 16, "workers": 0}
    for name, text in (("cache", ""), ("t5-cache", str(folder / "t5"))):
        values = {"output": str(folder / name), "tokenizer": str(folder / "tokenizer"), "data": data, "examples": 8}
        make_cache(CacheSettings.from_dict({**values, "text_encoder": text, "text_length": 24}))
    return folder


def training(root, **changes):
    data = {"size": 16, "workers": 0}
    return settings(**{"tokenizer": str(root / "tokenizer"), "data": data, **changes})


def test_new_models_depend_on_the_seed_alone(root):
    first = make_generator_task(training(root)).trained.state_dict()
    state = torch.get_rng_state()
    second = make_generator_task(training(root)).trained.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    run = {"output": "unused", "steps": 10, "batch_size": 8, "seed": 1}
    other = make_generator_task(training(root, run=run)).trained.state_dict()
    assert not torch.equal(other["generator.to_logits.weight"], first["generator.to_logits.weight"])


def test_the_scale_is_measured_on_the_first_examples(root):
    made = make_generator_task(training(root, residual_scale=None, residual_examples=35))
    data = training(root).data
    batches = list(calibration_batches(data, 35))
    assert [len(batch.keys) for batch in batches] == [32, 3]
    assert len({key for batch in batches for key in batch.keys}) == 35
    residual = torch.cat([made.tokens(batch, torch.device("cpu"))[1] for batch in batches])
    run = PlainRun(made)
    assert not made.scale_known
    made.train_step(run, [next(iter(calibration_batches(data, 8)))])
    scale = made.trained.generator.config.head_scale
    assert scale == pytest.approx(residual.double().std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("encoder", ["", "t5"])
@pytest.mark.parametrize("cache", ["cache", "t5-cache"])
def test_caches_with_and_without_states_serve_both_kinds(root, cache, encoder):
    changes = {"data": {"kind": "cache", "path": str(root / cache), "workers": 0}, "residual_scale": None}
    made = make_generator_task(training(root, **changes, text_encoder=str(root / encoder) if encoder else ""))
    assert made.joint == (encoder == "") and made.scale_known
    residual = [made.tokens(b, torch.device("cpu"))[1] for b in calibration_batches(training(root).data, 8)]
    expected = torch.cat(residual).double().std(correction=0).item()
    assert made.trained.generator.config.head_scale == pytest.approx(expected, rel=1e-6)
    batch = next(iter(calibration_batches(made.settings.data, 8)))
    assert torch.isfinite(made.train_step(PlainRun(made), [batch])["loss"])


def test_a_run_starts_from_another_one(root):
    larger = {"generator": {**GENERATOR.to_dict(), "num_tokens": 64}, "text": TEXT.to_dict()}
    changes = {"model": larger, "data": {"size": 32, "workers": 0}, "initial": str(root / "export")}
    made = make_generator_task(training(root, **changes))
    exported = DCARPipeline.from_pretrained(root / "export")
    assert torch.equal(made.trained.generator.to_logits.weight, exported.generator.to_logits.weight)
    assert torch.equal(made.text_encoder.t5.shared.weight, exported.text_encoder.t5.shared.weight)
    assert made.trained.generator.config.num_tokens == 64 and made.trained.text_encoder is made.text_encoder
    frozen = make_generator_task(training(root, **changes, text_encoder=str(root / "t5")))
    assert frozen.trained.text_encoder is None and frozen.text_encoder.config.tokenizer == "t5"


def bad(root, kind: str) -> dict:
    cached = {"data": {"kind": "cache", "path": str(root / "cache"), "workers": 0}}
    model = {"generator": GENERATOR.to_dict(), "text": TEXT.to_dict()}
    return {
        "size": {"data": {"size": 64}},
        "preset": {"model": "dc-ar-256", "data": {"size": 32}},
        "tokenizer": {"tokenizer": str(root / "none")},
        "t5 vocabulary": {"model": {**model, "text": {**TEXT.to_dict(), "tokenizer": "t5"}}},
        "no cache": {"data": {"kind": "cache", "path": str(root / "t5"), "workers": 0}},
        "another grid": {**cached, "model": {**model, "generator": {**GENERATOR.to_dict(), "num_tokens": 64}}},
        "another tokenizer": {**cached, "tokenizer": str(root / "other")},
        "another encoder": {
            "data": {"kind": "cache", "path": str(root / "t5-cache")},
            "text_encoder": str(root / "export"),
        },
        "another text": {
            "initial": str(root / "export"),
            "model": {**model, "text": {**TEXT.to_dict(), "num_layers": 2}},
        },
        "text encoder": {"text_encoder": str(root / "none")},
    }[kind]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("size", "data.size must be 16: the model has 4 x 4 tokens of 4 pixels; got 64"),
        ("preset", "the generator's codebook_size is 16384, its partner's is 64"),
        ("tokenizer", "none is not a folder"),
        ("t5 vocabulary", "text_encoder must name a folder or hub id"),
        ("no cache", "is no cache of tokens"),
        ("another grid", r"has grids \(4, 4\), the model \(8, 8\)"),
        ("another tokenizer", "was made with tokenizer"),
        ("another encoder", "was made with text_encoder"),
        ("another text", "initial: the text encoder of"),
        ("text encoder", "holds no T5 encoder"),
    ],
)
def test_what_does_not_fit_is_named(root, monkeypatch, kind, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if kind == "another tokenizer" and not (root / "other").exists():
        save_tokenizer(root / "other", models(seed=1)[0])
    with pytest.raises(ValueError, match=message):
        make_generator_task(training(root, **bad(root, kind)))
