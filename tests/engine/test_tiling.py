"""Tiles and smaller batches give the pixels of the whole, and take over when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from dcar_fast.engine import decoder_memory, tiling
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.engine.decoder_blocks import Mlp, Output, ResBlock, Upsample, pack
from dcar_fast.engine.decoder_memory import Plan, peak, plan
from dcar_fast.engine.tiling import Span, cuts, needed, reach_of, segments
from dcar_fast.models.tokenizer import DCHT
from tests.engine.decoder_cases import CONFIGS, latents, tokenizer


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> DCHT:
    return tokenizer(request.param)


def gap(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("shape", [(1, 9, 7), (2, 1, 11)], ids=str)
def test_exact_for_any_tile(model: DCHT, shape: tuple[int, int, int], tile: int) -> None:
    x = latents(model, *shape)
    assert gap(FastDecoder(model, tile=tile).decode(x), FastDecoder(model).decode(x)) < 1e-5


@pytest.mark.parametrize("cut", [Mlp, ResBlock, Upsample, Output], ids=lambda cut: cut.__name__)
def test_the_reach_is_as_small_as_can_be(cut: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pixel less around the tiles of such a layer some model goes wrong."""
    models = [tokenizer(name) for name in sorted(CONFIGS)]
    whole = [FastDecoder(model).decode(latents(model, 1, 7, 7)) for model in models]
    original = cut.__init__

    def less(self, *args):
        original(self, *args)
        self.reach -= 1

    monkeypatch.setattr(cut, "__init__", less)
    models = [tokenizer(name) for name in sorted(CONFIGS)]  # packed anew
    tiled = [FastDecoder(model, tile=2).decode(latents(model, 1, 7, 7)) for model in models]
    assert max(map(gap, tiled, whole)) > 1e-4


def test_a_tile_is_smaller_than_the_image(model: DCHT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers below the attention never see the whole image."""
    seen = []
    original = ResBlock.__call__
    monkeypatch.setattr(ResBlock, "__call__", lambda self, x, b: (seen.append(x.shape[2:]), original(self, x, b))[1])
    FastDecoder(model, tile=2).decode(latents(model, 1, 20, 3))
    assert seen and max(height for height, _ in seen) < 20 * model.config.compression // 2


def test_overlap(model: DCHT) -> None:
    """Fewer latents of overlap, larger errors; enough of them, and it is exact."""
    x = latents(model, 1, 20, 12)
    whole = FastDecoder(model).decode(x)
    errors = [gap(FastDecoder(model, tile=8, overlap=overlap).decode(x), whole) for overlap in (0, 1, 16)]
    assert errors[0] > errors[1] and errors[2] < 1e-5
    assert errors[0] > 1e-3


@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
@pytest.mark.parametrize("size", [1, 5, 8, 13])
def test_weights_of_blended_tiles_add_up(size: int, overlap: int) -> None:
    total = torch.zeros(4 * size)
    for span, weight in tiling._weighted(size, 4, overlap, 4, torch.device("cpu")):
        total[4 * span.start : 4 * span.stop] += weight
        assert (weight >= 0).all() and len(weight) == 4 * span.size
    assert torch.allclose(total, torch.ones(4 * size))


def test_spans() -> None:
    assert cuts(10, 4) == [Span(0, 3), Span(3, 6), Span(6, 10)]
    assert cuts(4, 4) == [Span(0, 4)] and cuts(1, 9) == [Span(0, 1)]
    layers = pack(tokenizer("wide").decoder, torch.float32)
    parts = list(segments(layers))
    assert [layer for part in parts for layer in part] == layers
    last = parts[-1]
    spans = needed(last, Span(0, 8), 50)
    assert spans[0].start == 0 and spans[-1] == Span(0, 8) and len(spans) == len(last) + 1
    assert 0 < reach_of(last) < 12


# When memory is short


class Allocator:
    """Fails for more than ``most`` pixels at the first layer below the attention, as an allocator would."""

    def __init__(self, most: int, error: BaseException) -> None:
        self.most, self.error, self.tried = most, error, []

    def __call__(self, original):
        def call(block, x: Tensor, backend: str | None) -> Tensor:
            pixels = len(x) * x.shape[2] * x.shape[3]
            self.tried.append(tuple(x.shape))
            if pixels > self.most:
                raise self.error
            return original(block, x, backend)

        return call


FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [100000, 2 * 576, 576, 400, 250])
def test_less_at_a_time(
    failure: BaseException, most: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tokenizer("wide")
    x = latents(model, 5, 6, 6)  # ResBlocks see images of 12 x 12 first, then of 24 x 24
    expected = FastDecoder(model).decode(x)
    allocator = Allocator(most, failure)
    monkeypatch.setattr(ResBlock, "__call__", allocator(ResBlock.__call__))
    monkeypatch.setattr(decoder_memory, "_told", set())
    with caplog.at_level(logging.WARNING):
        got = FastDecoder(model).decode(x)
        FastDecoder(model).decode(x)
    assert gap(got, expected) < 1e-5
    assert len(caplog.records) == (most < 5 * 576)
    ran = [shape for shape in allocator.tried if shape[0] * shape[2] * shape[3] <= most]
    if most >= 576:
        assert max(shape[0] for shape in ran if shape[2] == 24) == {100000: 5, 2 * 576: 2, 576: 1}[most]
    else:
        assert any(shape[2] < 12 for shape in allocator.tried)


def test_when_nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer("wide")
    allocator = Allocator(1, torch.OutOfMemoryError("out"))
    monkeypatch.setattr(ResBlock, "__call__", allocator(ResBlock.__call__))
    with pytest.raises(torch.OutOfMemoryError):
        FastDecoder(model).decode(latents(model, 3, 6, 6))
    assert len(allocator.tried) < 12


def test_other_errors_come_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer("wide")
    allocator = Allocator(1, RuntimeError("device-side assert"))
    monkeypatch.setattr(ResBlock, "__call__", allocator(ResBlock.__call__))
    with pytest.raises(RuntimeError, match="assert"):
        FastDecoder(model).decode(latents(model, 3, 6, 6))
    assert len(allocator.tried) == 1


def test_planned_by_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer("wide")
    layers, x = pack(model.decoder, torch.float32), latents(model, 7, 16, 16)
    one = 4 * peak(layers, (16, 16), None) / decoder_memory.SHARE
    monkeypatch.setattr(decoder_memory, "MODEST", 0)
    for room, images, tiled in ((8 * one, 7, False), (2.5 * one, 2, False), (one, 1, False), (0.8 * one, 1, True)):
        monkeypatch.setattr(decoder_memory, "free_memory", lambda _, room=room: room)
        found = plan(layers, x)
        assert found.images == images and (found.tile is not None) == tiled
        if found.tile:
            assert 4 * peak(layers, (16, 16), found.tile) <= 0.8 * one
            assert gap(FastDecoder(model).decode(x), FastDecoder(model, tile=16).decode(x)) < 1e-5
    monkeypatch.setattr(decoder_memory, "free_memory", lambda _: 1.0)
    assert plan(layers, x) == Plan(1, decoder_memory.SMALLEST_TILE)


def test_tensors_stay_within_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer("wide")
    layers, x = pack(model.decoder, torch.float32), latents(model, 7, 16, 16)
    most = decoder_memory.largest(layers, (16, 16))
    assert most == 32 * 32 * 1024  # the way up from stage 2: 4 x 256 channels before the shuffle
    monkeypatch.setattr(decoder_memory, "LARGEST_TENSOR", 3 * most)
    assert plan(layers, x) == Plan(3, None)


def test_less_and_less() -> None:
    steps, step = [], Plan(6, None)
    while step := step.smaller((20, 33)):
        steps.append(step)
    assert steps == [Plan(3, None), Plan(1, None), Plan(1, 17), Plan(1, 9), Plan(1, 5), Plan(1, 3), Plan(1, 2)]
    assert Plan(1, None).smaller((1, 1)) is None and Plan(1, None).smaller((2, 2)) is None


def test_free_memory(tmp_path) -> None:
    assert 1e6 < decoder_memory.free_memory(torch.device("cpu")) < 1e14
    assert decoder_memory._control_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert decoder_memory._control_group(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert decoder_memory._control_group(tmp_path) == float("inf")
