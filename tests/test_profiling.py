"""Stages: nothing while they are off, and the right ranges while they are on."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
import types
from contextlib import contextmanager

import pytest
import torch

from dcar_fast import DCAR, FastSampler, ReferenceSampler, SamplingConfig, profiling
from dcar_fast.config import preset
from dcar_fast.profiling import nvtx_ranges, record_stages, recording, stage, trace_ranges

WANTED = ["unmask 0", "unmask 1", "head", *(f"denoise {i}" for i in range(16))]  # the small preset's


@pytest.fixture(scope="module")
def model() -> DCAR:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DCAR(preset("shapes").generator).eval()


def sample(kind, model: DCAR) -> None:
    states, mask = torch.zeros(1, 3, model.config.text_dim), torch.ones(1, 3, dtype=torch.bool)
    kind(model, SamplingConfig(num_steps=2))(states, mask, 0, grid=(2, 2))


@pytest.fixture
def fake_nvtx(monkeypatch) -> list[str]:
    """The ranges that a package "nvtx" is asked for, those that close with a bar in front."""
    log: list[str] = []

    @contextmanager
    def annotate(name: str):
        log.append(name)
        yield
        log.append(f"|{name}")

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return log


def test_off_costs_nothing() -> None:
    """One look-up: the same object every time, and no call on the way to it."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append((event, frame.f_code.co_name)))
    try:
        first = stage("unmask", 3)
    finally:
        sys.setprofile(None)
    assert first is stage("head") is profiling._OFF and not recording()
    assert [call for call in calls if call[1] == "stage"] == [("call", "stage"), ("return", "stage")]
    names = stage.__code__.co_names
    assert names == ("_ranges", "_OFF"), names


def test_off_imports_nothing() -> None:
    code = "import sys; from dcar_fast.profiling import stage\nwith stage('text'): pass\n"
    code += "print([name for name in ('torch', 'nvtx') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("kind", [ReferenceSampler, FastSampler])
def test_ranges_of_a_sampler(model, fake_nvtx, kind) -> None:
    with nvtx_ranges():
        assert recording()
        sample(kind, model)
    assert not recording()
    assert [name for name in fake_nvtx if name[0] != "|"] == WANTED
    open_ranges: list[str] = []
    for name in fake_nvtx:  # each closes before what it is in
        open_ranges.append(name) if name[0] != "|" else None
        assert name[0] != "|" or open_ranges.pop() == name[1:]
        assert not name.startswith("denoise") or open_ranges[0] == "head"
    sample(kind, model)
    assert len(fake_nvtx) == 2 * len(WANTED)


def test_ranges_with_a_gpu_are_torchs(model, monkeypatch) -> None:
    log: list[str] = []

    @contextmanager
    def annotate(name: str):
        log.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", annotate)
    with nvtx_ranges(), stage("decode"), stage("unmask", 3):
        pass
    assert log == ["decode", "unmask 3"]


def test_no_nvtx_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="NVTX ranges need"), nvtx_ranges():
        pass
    assert not recording()


@pytest.mark.parametrize("kind", [ReferenceSampler, FastSampler])
def test_times_are_of_outer_stages_alone(model, kind) -> None:
    stops = []
    with record_stages(lambda: stops.append(1)) as times:
        sample(kind, model)
        with stage("decode"):
            time.sleep(0.02)
            with stage("inside"):
                time.sleep(0.02)
    assert set(times.seconds) == {"unmask", "head", "decode"} and times.seconds["decode"] >= 0.04
    assert len(stops) == 2 * 4


def test_an_exception_does_not_confuse_the_times() -> None:
    with record_stages() as times:
        with pytest.raises(KeyError), stage("text"):
            raise KeyError
        with stage("text"):
            pass
    assert set(times.seconds) == {"text"}


def test_ranges_in_a_trace(model) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found, trace_ranges():
        sample(FastSampler, model)
    names = [event.name for event in found.events()]
    assert [name for name in names if name in WANTED] == WANTED


@pytest.mark.gpu
def test_stages_are_seen_on_a_gpu_where_graphs_replay(model) -> None:
    """A call that replays shows none, so a call that is recorded runs without a graph, to the same tokens."""
    sampler = FastSampler(copy.deepcopy(model).cuda(), SamplingConfig(num_steps=2))
    states = torch.zeros(1, 3, model.config.text_dim, device="cuda")
    mask = torch.ones(1, 3, dtype=torch.bool, device="cuda")
    replayed = sampler(states, mask, 0, grid=(2, 2))
    with record_stages(torch.cuda.synchronize) as times:
        recorded = sampler(states, mask, 0, grid=(2, 2))
    assert set(times.seconds) == {"unmask", "head"} and min(times.seconds.values()) > 0
    assert torch.equal(recorded.ids, replayed.ids)
