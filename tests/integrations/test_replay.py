"""A patched head in graphs, with a recorder that replays by calling again; and on a GPU, with graphs."""

from __future__ import annotations

import logging

import pytest
import torch

from dcar_fast.integrations import _replay, patch_diffloss
from dcar_fast.integrations._replay import BUCKETS, bucket, pad
from tests.engine.test_graph import Recorder
from tests.golden_vectors import error
from tests.integrations.test_diffloss import KINDS, condition, draw, make


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Stands for the CUDA device's."""
    made = Recorder()
    monkeypatch.setattr(_replay, "recorder", lambda device: made)
    monkeypatch.setattr("dcar_fast.integrations._fast_sample.recorder", lambda device: made)
    return made


def test_buckets():
    assert BUCKETS[:7] == (1, 2, 3, 4, 6, 8, 12) and BUCKETS[-1] == 4096
    assert [bucket(n) for n in (1, 5, 4096, 4097)] == [1, 6, 4096, None]


def test_padding_keeps_the_branches_apart():
    x = torch.arange(6.0).view(6, 1)
    assert pad(x, 0, 2, 4)[:, 0].tolist() == [0, 1, 2, 0, 3, 4, 5, 0]
    assert pad(x, 0, 1, 8)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    steps = torch.stack((x, x + 10))
    assert pad(steps, 1, 2, 4)[1, :, 0].tolist() == [10, 11, 12, 0, 13, 14, 15, 0]


@pytest.mark.parametrize("rng", ["parity", "counter"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_what_runs_without_them(kind, rng, recorder):
    head = make(kind)
    with patch_diffloss(head, rng=rng, graphs=False):
        plain = {(rows, cfg): draw(head, rows, cfg) for rows in (2, 10, 14) for cfg in (1.0, 2.5, 0.5)}
    assert not recorder.recorded
    with patch_diffloss(head, rng=rng, graphs=True) as patch:
        assert "in CUDA graphs" in patch.explain()
        for (rows, cfg), (expected, generator) in plain.items():
            found, after = draw(head, rows, cfg)
            assert error(found, expected) < 1e-5 * expected.abs().max() and after == generator
    # 2, 12 and 16 rows without guidance; 1, 6 and 8 pairs with any
    assert recorder.recorded == 6


def test_another_guidance_needs_no_other_graph(recorder):
    head = make()
    patch_diffloss(head)
    found = [draw(head, 6, torch.tensor([cfg]))[0] for cfg in (1.5, 2.0, 2.5)]
    assert recorder.recorded == 1
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_changed_weights_are_captured_anew(recorder):
    head = make()
    patch_diffloss(head)
    draw(head)
    head.net.cond_embed.weight.data.mul_(1.5)
    found = draw(head)[0]
    torch.manual_seed(5)
    assert recorder.recorded == 2
    assert error(found, type(head).sample(head, condition(6), 1.0, 2.5)) < 1e-4


def test_many_rows_run_as_they_are(recorder, monkeypatch):
    monkeypatch.setattr(_replay, "BUCKETS", (1, 2, 4))
    head = make()
    before = draw(head, 6, 1.0)[0]
    patch_diffloss(head)
    assert error(draw(head, 6, 1.0)[0], before) < 1e-4 and not recorder.recorded


def test_a_capture_that_fails_is_said_once_and_costs_no_result(recorder, monkeypatch, caplog):
    def broken(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", broken)
    head = make()
    before = draw(head)[0]
    patch_diffloss(head)
    with caplog.at_level(logging.WARNING, "dcar_fast"):
        assert all(error(draw(head)[0], before) < 1e-4 for _ in range(2))
    assert caplog.text.count("runs without CUDA graphs") == 1


def test_graphs_are_refused_where_there_are_none():
    head = make()
    with pytest.raises(ValueError, match="graphs is True, but CUDA graphs need a CUDA device, the head is on cpu"):
        patch_diffloss(head, graphs=True)
    with pytest.raises(ValueError, match="graphs must be 'auto', True or False"):
        patch_diffloss(head, graphs="yes")
    assert "sample" not in vars(head)


@pytest.mark.gpu
@pytest.mark.parametrize("rng", ["parity", "counter"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_on_a_gpu(kind, rng):
    head = make(kind).cuda()
    z = condition(10).cuda()

    def sample(cfg: float) -> torch.Tensor:
        torch.manual_seed(5)
        return head.sample(z, 0.9, cfg)

    for cfg in (1.0, 2.5):
        original = sample(cfg)
        with patch_diffloss(head, rng=rng, graphs=False):
            plain = sample(cfg)
        with patch_diffloss(head, rng=rng, graphs=True):
            replayed = [sample(cfg) for _ in range(3)]
        if rng == "parity":
            assert error(plain, original) < 1e-3 * original.abs().max()
        assert all(error(one, plain) < 1e-5 * plain.abs().max() for one in replayed)
