"""Caches of tokens: what is read is what was written, writing continues after an interruption, damage is named."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dcar_fast.training.data.cache_writer import CacheWriter
from dcar_fast.training.data.cached import CachedSource, read_index
from dcar_fast.training.data.loader import make_loader
from tests.training.data_files import settings

BATCH, H, W, C, T, D = 3, 2, 3, 4, 5, 6
MADE_BY: dict[str, Any] = {"tokenizer": "tok-1", "codebook_size": 100, "shard_size": 5}


def batch(number: int, text: bool = False, codebook: int = 100) -> dict[str, Any]:
    """Random content; the first row of a batch has an empty caption, and no text states."""
    rng = torch.Generator().manual_seed(number)
    ids = torch.randint(0, codebook, (BATCH, H, W), generator=rng)
    ids[0, 0, :2] = torch.tensor([0, codebook - 1])
    given = {
        "keys": [f"{number}-{b} é" for b in range(BATCH)],
        "captions": ["", "ein Löwe", "x" * number],
        "ids": ids,
        "residual": torch.randn(BATCH, H * W, C, generator=rng) * 0.1 + 0.02,
    }
    if text:
        lengths = torch.tensor([0, 2, T])
        mask = torch.arange(T) < lengths[:, None]
        states = torch.randn(BATCH, T, D, generator=rng).half().float()
        given |= {"text_states": states, "text_mask": mask}
    return given


def write(folder: Path, batches: range, **changes: Any) -> CacheWriter:
    given = {**MADE_BY, **changes}
    writer = CacheWriter(folder, **given)
    for i in batches:
        content = batch(i, given.get("text_encoder") is not None, given["codebook_size"])
        writer.add(**content, position={"next": i + 1})
    return writer


def read(folder: Path, seed: int = 0) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    source = CachedSource(folder, seed)
    examples = [source.example(i) for i in range(len(source))]
    return {e.key: (e.caption, {name: torch.from_numpy(t) for name, t in e.tensors.items()}) for e in examples}


@pytest.mark.parametrize("text_encoder", [None, "t5-base"])
@pytest.mark.parametrize("codebook_size", [100, 2**15, 2**15 + 1])
def test_round_trip(tmp_path: Path, text_encoder: str | None, codebook_size: int) -> None:
    write(tmp_path, range(4), text_encoder=text_encoder, codebook_size=codebook_size).finish()
    found = read(tmp_path)
    assert len(found) == 12
    for i in range(4):
        given = batch(i, text_encoder is not None, codebook_size)
        for b, key in enumerate(given["keys"]):
            caption, tensors = found[key]
            assert caption == given["captions"][b]
            assert tensors["ids"].dtype == torch.int64 and torch.equal(tensors["ids"], given["ids"][b])
            assert tensors["residual"].dtype == torch.float32 and torch.equal(tensors["residual"], given["residual"][b])
            assert ("text_states" in tensors) == (text_encoder is not None)
            if text_encoder is not None:
                kept = given["text_states"][b] * given["text_mask"][b][:, None]
                assert torch.equal(tensors["text_states"].float(), kept)
                assert torch.equal(tensors["text_mask"], given["text_mask"][b])


def test_half_precision_residuals_keep_their_bound(tmp_path: Path) -> None:
    write(tmp_path, range(4), residual_dtype="float16").finish()
    for i in range(4):
        given, found = batch(i), read(tmp_path)
        stored = torch.stack([found[key][1]["residual"] for key in given["keys"]])
        error = (stored - given["residual"]).abs()
        assert error.max() > 0 and (error <= given["residual"].abs() * 2**-11 + 2**-25).all()


def test_statistics_of_the_residuals(tmp_path: Path) -> None:
    index = write(tmp_path, range(7)).finish()
    values = torch.cat([batch(i)["residual"] for i in range(7)]).double()
    written = json.loads((tmp_path / "index.json").read_text())
    for value in (index.residual_std, written["residual_std"], read_index(tmp_path).residual_std):
        assert value == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert index.residual_mean == pytest.approx(float(values.mean()), rel=1e-9) and written["count"] == 21


def test_an_interrupted_writer_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(9)).finish()
    write(tmp_path / "parts", range(5))  # no finish: killed. 15 examples came, two shards of 6 are written
    assert read_index(tmp_path / "parts").count == 12 and not read_index(tmp_path / "parts").complete
    (tmp_path / "parts" / "tokens-00002.safetensors").write_bytes(b"a shard that the index does not list yet")
    writer = CacheWriter(tmp_path / "parts", **MADE_BY)
    assert writer.index.position == {"next": 4} and writer.count == 12
    write(tmp_path / "parts", range(writer.index.position["next"], 9)).finish()
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert whole.keys() == parts.keys() and read_index(tmp_path / "parts").complete
    assert all(torch.equal(whole[key][1]["residual"], parts[key][1]["residual"]) for key in whole)
    assert read_index(tmp_path / "parts").residual_std == pytest.approx(read_index(tmp_path / "whole").residual_std)


def test_a_cache_can_grow_after_it_was_finished(tmp_path: Path) -> None:
    write(tmp_path, range(1)).finish()
    write(tmp_path, range(1, 3))
    assert not read_index(tmp_path).complete and len(read(tmp_path)) == 9
    write(tmp_path, range(3, 4)).finish()
    assert read_index(tmp_path).complete and len(read(tmp_path)) == 12


def test_unfinished_caches_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, range(3))
    assert len(CachedSource(tmp_path)) == 6 and "was not finished: using its 6 examples" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizer", "tok-2"), ("text_encoder", "t5"), ("codebook_size", 99), ("residual_dtype", "float16"), ("data", 1)],
)
def test_a_cache_of_something_else_is_not_continued(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, range(2), data={"kind": "shapes", "sides": (1, 2)})
    CacheWriter(tmp_path, **MADE_BY, data={"kind": "shapes", "sides": (1, 2)})
    changed = {**MADE_BY, "data": {"kind": "shapes", "sides": (1, 2)}, name: {"x": 1} if name == "data" else value}
    with pytest.raises(ValueError, match=f"was made with {name} "):
        CacheWriter(tmp_path, **changed)


def test_check_made_by(tmp_path: Path) -> None:
    write(tmp_path, range(1), text_encoder="t5").finish()
    source = CachedSource(tmp_path)
    source.check_made_by("tok-1", "t5")
    for tokenizer, text_encoder, name in (("tok-2", "t5", "tokenizer"), ("tok-1", None, "text_encoder")):
        with pytest.raises(ValueError, match=f"was made with {name} "):
            source.check_made_by(tokenizer, text_encoder)


def test_a_folder_of_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds safetensors files of something else"):
        CacheWriter(tmp_path, **MADE_BY)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def spoil(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ["a"]}, "keys and captions"),
        ({"keys": [], "captions": []}, "keys and captions"),
        ({"ids": torch.zeros(BATCH, H * W)}, "ids must be"),
        ({"ids": torch.full((BATCH, H, W), 100)}, r"ids must be in 0..99, got 100..100"),
        ({"ids": torch.full((BATCH, H, W), -1)}, r"ids must be in 0..99, got -1..-1"),
        ({"residual": torch.zeros(BATCH, H, C)}, "residual must be"),
        ({"residual": torch.full((BATCH, H * W, C), float("nan"))}, "residual must be finite"),
        ({"text_states": None, "text_mask": None}, "text_states and text_mask come together"),
        ({"text_mask": torch.ones(BATCH, T)}, "text_states and text_mask must be"),
        ({"text_mask": torch.tensor([[True, False, True, False, False]] * BATCH)}, "True first"),
        ({"text_states": torch.full((BATCH, T, D), 1e5)}, "finite in float16"),
        ({"residual": torch.zeros(BATCH, H * W, C + 1)}, "latent_channels must be 4 as in the examples before, got 5"),
        ({"ids": torch.zeros(BATCH, W, H, dtype=torch.int64)}, "grid must be"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    writer = write(tmp_path, range(1), text_encoder="t5")
    with pytest.raises(ValueError, match=message):
        writer.add(**{**batch(1, text=True), **changes})
    assert writer.count == BATCH


@pytest.mark.parametrize(
    ("name", "value"), [("residual_dtype", "bfloat16"), ("shard_size", 0), ("codebook_size", True)]
)
def test_settings_are_checked(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        CacheWriter(tmp_path, **{**MADE_BY, name: value})


def test_damaged_and_foreign_shards_are_named(tmp_path: Path) -> None:
    for folder in ("a", "b"):  # two shards of the same size
        write(tmp_path / folder, range(2))
        write(tmp_path / folder, range(2)).finish()
    first, second = (tmp_path / "a" / f"tokens-0000{i}.safetensors" for i in range(2))
    good = first.read_bytes()
    cases = [
        (good[:-7], "bytes, .* were written"),
        (b"\xff" * len(good), "header"),
        ((tmp_path / "b" / first.name).read_bytes(), "belongs to another cache"),
        (second.read_bytes(), "belongs to another cache"),  # swapped within the cache
    ]
    for data, message in cases:
        first.write_bytes(data)
        with pytest.raises(ValueError, match=f"tokens-00000.safetensors is no usable shard of its cache: .*{message}"):
            CachedSource(tmp_path / "a")
    first.unlink()
    with pytest.raises(ValueError, match="tokens-00000.safetensors is no usable shard"):
        CachedSource(tmp_path / "a")
    first.write_bytes(good)
    CachedSource(tmp_path / "a")


def test_ids_that_cannot_be_are_found_when_they_are_read(tmp_path: Path) -> None:
    write(tmp_path, range(2), shard_size=100).finish()
    index = json.loads((tmp_path / "index.json").read_text())
    index["codebook_size"] = 3
    (tmp_path / "index.json").write_text(json.dumps(index))
    source = CachedSource(tmp_path)
    with pytest.raises(ValueError, match=r"tokens-00000.safetensors, example \d+ is damaged: ids out of 0..2"):
        [source.example(i) for i in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is no cache of tokens"),
        ("{", "cannot be used"),
        ("[]", "its format is not"),
        ({"format": "x"}, "its format is not"),
        ({"version": 2}, "its version is 2, this release reads 1"),
        ({"novelty": 1}, "cannot be used: .*novelty"),
        ({"residual_dtype": "int8"}, "make no sense"),
        ({"shards": [{"file": "../x", "count": 1, "bytes": 1}]}, "make no sense"),
        ({"shards": [{}]}, "cannot be used"),
        ({"shards": []}, "has no examples"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path, range(2)).finish()
    path = tmp_path / "index.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        CachedSource(tmp_path)


def test_every_epoch_has_every_example_in_another_order(tmp_path: Path) -> None:
    write(tmp_path, range(4)).finish()
    source = CachedSource(tmp_path, seed=2)
    epochs = [[source.example(12 * e + i).key for i in range(12)] for e in range(3)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.example(12 + i).key for i in range(12)] == epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_cache(tmp_path: Path, workers: int) -> None:
    write(tmp_path, range(4), text_encoder="t5").finish()
    with make_loader(settings("cache", tmp_path, workers=workers), batch_size=4) as loader:
        batches = list(islice(loader, 6))
    given = {key: (b, i) for i in range(4) for b, key in enumerate(batch(i)["keys"])}
    for found in batches:
        assert found.images is None and set(found.cached) == {"ids", "residual", "text_states", "text_mask"}
        assert found.cached["ids"].shape == (4, H, W) and found.cached["text_states"].shape == (4, T, D)
        for row, key in enumerate(found.keys):
            b, i = given[key]
            assert torch.equal(found.cached["residual"][row], batch(i)["residual"][b])
            assert found.captions[row] == batch(i)["captions"][b]
