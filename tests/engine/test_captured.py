"""Text encoder and decoder in graphs: on a CPU with a recorder that replays by calling again, on a GPU for real."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

from dcar_fast.config import preset
from dcar_fast.engine import captured
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.pipeline import DCARPipeline
from tests.engine.test_graph import Recorder
from tests.golden_vectors import error

PROMPTS = ["a red circle", "", "two blue squares and a green triangle", "x"]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands in for a GPU's."""
    made = Recorder()
    monkeypatch.setattr("dcar_fast.engine.graph.cuda_recorder", lambda device: made)
    monkeypatch.setattr(captured, "captures", lambda device: True)
    return made


def text_encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(preset("shapes").text).eval()


def tokenizer() -> DCHT:
    torch.manual_seed(0)
    return DCHT(preset("shapes").tokenizer).eval().requires_grad_(False)


def tokens(batch: int, side: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(512, (batch, side, side)), torch.randn(batch, side * side, 16) / 10


def test_text(recorder: Recorder) -> None:
    encoder = text_encoder()
    for prompts in (PROMPTS, PROMPTS[:3], PROMPTS[1:2], PROMPTS * 5, PROMPTS[:1]):
        expected = encoder(prompts)
        for _ in range(2):
            found = captured.encode_text(encoder, prompts)
            assert torch.equal(found.mask, expected.mask) and found.lengths == expected.lengths
            assert error(found.states[found.mask], expected.states[expected.mask]) < 1e-5
            assert not found.states.requires_grad
    assert recorder.recorded == 3, "4 and 16 images with the long prompt, 1 with either of the short ones"


def test_changed_text_weights_are_seen(recorder: Recorder) -> None:
    encoder = text_encoder()
    before = captured.encode_text(encoder, PROMPTS).states
    with torch.no_grad():
        encoder.t5.shared.weight.mul_(2).add_(torch.randn_like(encoder.t5.shared.weight))
    after = captured.encode_text(encoder, PROMPTS)
    assert error(after.states, encoder(PROMPTS).states) < 1e-5 and error(after.states, before) > 1e-3


def test_decoding(recorder: Recorder) -> None:
    module = tokenizer()
    for batch, side in ((1, 2), (3, 2), (4, 2), (2, 3), (18, 1)):
        ids, residual = tokens(batch, side)
        expected = FastDecoder(module).decode_tokens(ids, residual)
        for _ in range(2):
            assert error(captured.decode_tokens(module, ids, residual), expected) < 1e-5
    assert recorder.recorded == 5, "batches of 1 and 4, a larger grid, 16 and 2 of a smaller one"


def test_decoding_without_memory_for_a_graph(recorder: Recorder, caplog) -> None:
    module, (ids, residual) = tokenizer(), tokens(2)
    recorder.shortages = 1
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            found = captured.decode_tokens(module, ids, residual)
        assert error(found, FastDecoder(module).decode_tokens(ids, residual)) < 1e-5
    assert caplog.text.count("decoding 2 images without a CUDA graph from now on: no memory to capture") == 1
    assert recorder.recorded == 0, "it is not tried again"
    captured.decode_tokens(module, ids[:1], residual[:1])
    assert recorder.recorded == 1, "fewer images are"


def test_modules_that_are_gone_take_their_graphs_along(recorder: Recorder) -> None:
    encoder, module = text_encoder(), tokenizer()
    captured.encode_text(encoder, PROMPTS)
    captured.decode_tokens(module, *tokens(1))
    gone = [weakref.ref(encoder), weakref.ref(module)]
    assert len(recorder.users) == 2
    del encoder, module
    gc.collect()
    assert [one() for one in gone] == [None, None] and len(recorder.users) == 0


def test_without_a_gpu_nothing_is_captured(monkeypatch) -> None:
    monkeypatch.setattr("dcar_fast.engine.graph.cuda_recorder", lambda device: pytest.fail("no GPU"))
    captured.encode_text(text_encoder(), PROMPTS)
    captured.decode_tokens(tokenizer(), *tokens(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_text_to_pixels_nothing_waits_for_the_gpu(dtype: torch.dtype) -> None:
    pipeline = DCARPipeline.from_preset("shapes", seed=0, device="cuda", dtype=dtype)
    grid = pipeline.grid(None, None)

    def draw(seed: int) -> torch.Tensor:
        text = pipeline.encode_text(PROMPTS[::2])
        return pipeline.decode(pipeline.generate(text, seed, grid=grid), grid)

    for seed in range(3):
        expected = draw(seed)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = draw(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected), "the same graphs, the same bits"


@pytest.mark.gpu
def test_both_engines_draw_the_same(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds to 2^-11
    pipeline = DCARPipeline.from_preset("shapes", seed=0, device="cuda")
    pictures = {}
    for engine in ("fast", "reference"):
        pipeline.engine = engine
        text = pipeline.encode_text(PROMPTS)
        sample = pipeline.generate(text, 3)
        pictures[engine] = sample.ids, pipeline.decode(sample, pipeline.grid(None, None)).int()
    assert torch.equal(pictures["fast"][0], pictures["reference"][0])
    assert (pictures["fast"][1] - pictures["reference"][1]).abs().max() <= 2
