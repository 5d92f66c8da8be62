"""Caching tokens, residuals and text states: training from the cache is training on the pictures."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_fast.checkpoints import save_tokenizer
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.training import cache as cache_module
from dcar_fast.training.cache import encode_batch, make_cache, text_fingerprint, tokenizer_fingerprint
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.data.cached import CachedSource, CacheIndex
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.data.loader import collate
from dcar_fast.training.generator import GeneratorTask
from dcar_fast.training.settings import DataSettings
from tests import tiny_t5
from tests.training.tiny_generator import CAPTIONS, PlainRun, models, settings

ROWS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a tokenizer, a T5 encoder, and eight pictures with captions."""
    root = tmp_path_factory.mktemp("made")
    save_tokenizer(root / "tokenizer", models()[0])
    tiny_t5.save(root / "t5", d_model=16)
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(caption)
    return root


def run(root, output, /, **changes) -> CacheIndex:
    data = DataSettings(kind="folder", path=str(root / "pictures"), size=16, workers=0)
    values = {"output": str(output), "tokenizer": str(root / "tokenizer"), "data": data, "batch_size": 3}
    return make_cache(CacheSettings(**{**values, "text_length": 24, **changes}))


def examples(folder) -> dict[str, object]:
    source = CachedSource(folder)
    return {example.key: example for example in map(source.example, range(len(source)))}


def batches(root, folder) -> tuple[Batch, Batch]:
    """The same rows, from the pictures and from the cache."""
    found = examples(folder)
    keys = sorted(found)
    cached = collate([found[key] for key in keys], {})
    pixels = [np.asarray(Image.open(root / "pictures" / f"{i}.png")) for i in range(ROWS)]
    number = {caption: i for i, caption in enumerate(CAPTIONS)}
    images = np.stack([pixels[number[caption]].transpose(2, 0, 1) for caption in cached.captions])
    return Batch(keys, list(cached.captions), torch.from_numpy(images)), cached


def losses(task: GeneratorTask, batch: Batch, steps: int = 3) -> list[float]:
    run, found = PlainRun(task), []
    for _ in range(steps):
        found.append(float(task.train_step(run, [batch])["loss"]))
        run.step += 1
    return found


def test_training_from_the_cache_gives_the_same_losses(made, tmp_path):
    index = run(made, tmp_path)
    assert index.complete and index.count == ROWS and index.text_encoder is None
    on_the_fly, cached = batches(made, tmp_path)
    assert sorted(cached.captions) == sorted(CAPTIONS) and cached.images is None
    expected = losses(GeneratorTask(settings(), *models(), joint=True), on_the_fly)
    assert losses(GeneratorTask(settings(), *models(), joint=True), cached) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3


def test_text_states_of_a_frozen_encoder(made, tmp_path):
    index = run(made, tmp_path, text_encoder=str(made / "t5"))
    encoder = TextEncoder.from_t5(made / "t5", max_length=24)
    assert index.text_encoder == text_fingerprint(encoder) and (index.text_length, index.text_dim) == (24, 16)
    on_the_fly, cached = batches(made, tmp_path)
    expected = encoder(on_the_fly.captions)
    longest = expected.mask.shape[1]
    assert torch.equal(cached.cached["text_mask"][:, :longest], expected.mask)
    assert not cached.cached["text_mask"][:, longest:].any()
    states = cached.cached["text_states"][:, :longest][expected.mask]
    torch.testing.assert_close(states.float(), expected.states[expected.mask], rtol=2**-11, atol=1e-6)

    def task():
        tokenizer, generator, _ = models()
        return GeneratorTask(settings(), tokenizer, generator, encoder, joint=False)

    assert losses(task(), cached) == pytest.approx(losses(task(), on_the_fly), rel=1e-3)  # states in float16
    used = task()
    used.text_encoder.forward = None  # the states come from the cache
    states, mask = used.text(cached, torch.device("cpu"))
    assert states.shape == (ROWS, longest, 16) and torch.equal(mask, expected.mask)


def test_an_interrupted_cache_goes_on(made, tmp_path, monkeypatch):
    wanted = run(made, tmp_path / "whole", shard_size=2)
    encode, calls = cache_module.encode_batch, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(cache_module, "encode_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "cut", shard_size=2)
    index = json.loads((tmp_path / "cut" / "index.json").read_text())
    assert index["count"] == 3 and not index["complete"]
    assert run(made, tmp_path / "cut", shard_size=2).count == wanted.count
    assert len(calls) == 2 + 2, "what was there is not encoded again"
    a, b = examples(tmp_path / "whole"), examples(tmp_path / "cut")
    assert a.keys() == b.keys() and len(a) == ROWS
    for key, example in a.items():
        assert example.caption == b[key].caption
        assert all(np.array_equal(tensor, b[key].tensors[name]) for name, tensor in example.tensors.items())
    assert run(made, tmp_path / "cut", shard_size=2).count == ROWS, "nothing more to do"
    assert len(calls) == 4
    with pytest.raises(ValueError, match="was made with data"):
        run(made, tmp_path / "cut", shard_size=2, batch_size=4)


def test_one_process_writes_a_cache_and_clears_what_killed_ones_left(made, tmp_path, monkeypatch):
    def held(*_):
        raise OSError(errno.EAGAIN, "held")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is being written by another process"):
        patch.setattr(fcntl, "lockf", held)
        run(made, tmp_path)
    names = [".tokens-00000-x1y2.safetensors", ".index-x1y2.json"]
    for name in names:
        (tmp_path / name).write_text("half")
    run(made, tmp_path)
    assert not {path.name for path in tmp_path.iterdir()} & set(names)


def test_a_number_of_examples_and_the_number_of_workers(made, tmp_path):
    data = DataSettings(kind="folder", path=str(made / "pictures"), size=16, workers=1)
    index = run(made, tmp_path, examples=11, data=data, residual_dtype="float16")
    assert index.count == 11 and index.residual_dtype == "float16"
    data = dataclasses.replace(data, workers=0)
    assert run(made, tmp_path, examples=13, data=data, residual_dtype="float16").count == 13


def test_shapes_need_a_number(made, tmp_path):
    data = DataSettings(kind="shapes", size=16, workers=0)
    with pytest.raises(ValueError, match="examples must be given with data.kind 'shapes'"):
        run(made, tmp_path / "a", data=data)
    assert not (tmp_path / "a").exists()
    index = run(made, tmp_path / "a", data=data, examples=4)
    assert index.count == 4 and index.tokenizer == tokenizer_fingerprint(models()[0])


def test_captions_with_a_pad_inside_are_left_out(made, caplog):
    encoder = TextEncoder.from_t5(made / "t5", max_length=24)
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    batch = Batch(["a", "b", "c"], ["one", "t<pad>wo", "three"], images)
    with caplog.at_level(logging.WARNING):
        rows = encode_batch(batch, models()[0].eval(), encoder, torch.device("cpu"))
    assert rows["keys"] == ["a", "c"] and rows["captions"] == ["one", "three"]
    assert all(len(rows[name]) == 2 for name in ("ids", "residual", "text_states", "text_mask"))
    assert "b is left out: its caption holds a pad" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output": ""}, "CacheSettings.output must be a folder"),
        ({"examples": -1}, "CacheSettings.examples must be an integer >= 0, got -1"),
        ({"batch_size": 0}, "CacheSettings.batch_size must be a positive integer"),
        ({"residual_dtype": "int8"}, "CacheSettings.residual_dtype must be one of"),
        ({"data": DataSettings(kind="cache", path="x")}, "CacheSettings.data must be pictures, no cache"),
        ({"tokenizer": "/none"}, "tokenizer: /none is not a folder"),
        ({"text_encoder": "/none"}, "text encoder: '/none' holds no T5 encoder"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
    ],
)
def test_bad_input_is_named(made, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(made, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_cache_outlives_training_of_the_decoder() -> None:
    tokenizer = models()[0]
    before = tokenizer_fingerprint(tokenizer)
    with torch.no_grad():
        tokenizer.decoder.project_in.conv.weight.add_(1.0)
        assert tokenizer_fingerprint(tokenizer) == before
        tokenizer.quantizer.embedding.weight.add_(1.0)
    assert tokenizer_fingerprint(tokenizer) != before
