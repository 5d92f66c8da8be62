"""Sampling through captured calls: buckets, padding, parts, fallbacks. On a CPU the recorder replays by calling again,
so that everything but CUDA's own part is tested; on a GPU the graphs are real."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch

from dcar_fast.config import DCARConfig, SamplingConfig
from dcar_fast.engine.base import Engine
from dcar_fast.engine.fused import FusedEngine
from dcar_fast.engine.graph import CaptureError, Graphs
from dcar_fast.engine.packed import PackedEngine
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import TorchNoise
from dcar_fast.sampling import FastSampler, Known, ReferenceSampler
from tests.engine.test_graph import Recorder
from tests.golden_vectors import error

CONFIG = DCARConfig(
    codebook_size=64,
    latent_channels=8,
    num_tokens=16,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=128,
    text_length=48,
    text_dim=24,
    head_width=32,
    head_depth=2,
    head_steps=4,
)
SAMPLING = SamplingConfig(num_steps=4)


def random_model(seed: int = 0) -> DCAR:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DCAR(CONFIG).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


MODEL = random_model()


def prompts(lengths: list[int], seed: int = 0, longest: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    size = max(1, *lengths) if longest is None else longest
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), size, CONFIG.text_dim, generator=made), mask


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Lets the engines capture on a CPU; the recorders made on the way."""
    made: list[Recorder] = []

    def graphs(engine: Engine) -> Graphs:
        if "fake" not in vars(engine):
            made.append(Recorder())
            vars(engine)["fake"] = Graphs(made[-1], limit=3)
        return vars(engine)["fake"]

    for kind in (FusedEngine, PackedEngine):
        monkeypatch.setattr(kind, "graphs", property(graphs))
        monkeypatch.setattr(kind, "no_graph", lambda engine: engine.capture_failed)
    return made


def fast(model: DCAR = MODEL, **options) -> FastSampler:
    return FastSampler(model, options.pop("config", SAMPLING), options.pop("backend", "reference"), **options)


def check(found, expected) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert error(found.residual, expected.residual) < 1e-3  # at t = 999 rounding is multiplied by 2e4


@pytest.mark.parametrize("lengths", [[5], [0], [20, 3], [48, 1, 33], [7] * 5, [*range(17)], [30] * 35])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_padding_and_parts_change_nothing(lengths: list[int], backend: str, captures) -> None:
    model = copy.deepcopy(MODEL)
    seeds = [2**40 + 3 * i for i in range(len(lengths))]
    states, mask = prompts(lengths, longest=48)
    expected = ReferenceSampler(model, SAMPLING)(states, mask, seeds)
    for given in (None, lengths):
        check(fast(model, backend=backend)(states, mask, seeds, lengths=given), expected)
    assert len(captures) == 1 and captures[0].recorded >= 1, "it was captured"


def test_a_bucket_is_captured_once_and_serves_other_prompts_and_seeds(captures) -> None:
    model = copy.deepcopy(MODEL)
    sampler, reference = fast(model), ReferenceSampler(model, SAMPLING)
    for seed, lengths in enumerate(([3, 4, 5], [1, 1, 1, 1], [32, 0, 9], [6, 2, 8])):
        inputs = (*prompts(lengths, seed), 100 * seed)
        check(sampler(*inputs), reference(*inputs))
    assert captures[0].recorded == 1
    check(sampler(*prompts([33]), 1), reference(*prompts([33]), 1))
    assert captures[0].recorded == 2


def test_buckets_take_turns_and_old_ones_are_captured_again(captures) -> None:
    model = copy.deepcopy(MODEL)
    sampler, reference = fast(model), ReferenceSampler(model, SAMPLING)
    for turn in range(2):
        for lengths in ([1], [1] * 2, [1] * 4, [40], [40] * 2):
            inputs = (*prompts(lengths, turn), turn)
            check(sampler(*inputs), reference(*inputs))
    assert captures[0].recorded == 10, "the limit is 3"


def test_samplers_of_one_model_share_weights_but_no_graph(captures) -> None:
    model = copy.deepcopy(MODEL)
    other = SamplingConfig(num_steps=3, guidance_scale=2.0, final_forward=True)
    inputs = (*prompts([4, 9]), 8)
    for config in (SAMPLING, other, SAMPLING):
        check(fast(model, config=config)(*inputs), ReferenceSampler(model, config)(*inputs))
    assert len(captures) == 1 and captures[0].recorded == 2


def test_other_grids(captures) -> None:
    model = copy.deepcopy(MODEL)
    for grid in ((2, 3), (4, 4), (5, 1)):
        inputs = (*prompts([4, 9]), 8)
        check(fast(model)(*inputs, grid=grid), ReferenceSampler(model, SAMPLING)(*inputs, grid=grid))
    assert captures[0].recorded == 3


def test_changed_weights_are_captured_anew(captures) -> None:
    model = copy.deepcopy(MODEL)
    sampler, inputs = fast(model), (*prompts([4, 9]), 8)
    check(sampler(*inputs), ReferenceSampler(model, SAMPLING)(*inputs))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    check(sampler(*inputs), ReferenceSampler(model, SAMPLING)(*inputs))
    assert len(captures) == 2


def test_warmup_captures_the_largest_first(captures) -> None:
    sampler = fast(copy.deepcopy(MODEL))
    assert sampler.warmup([1, 3], [32, 40]) == [(4, 48), (4, 32), (1, 48), (1, 32)]
    assert captures[0].recorded == 4
    with pytest.raises(ValueError, match=r"batches must be integers in 1\.\.16, got \[17\]"):
        sampler.warmup([17])
    with pytest.raises(ValueError, match=r"lengths must be integers in 1\.\.48, got \[49\]"):
        sampler.warmup([1], [49])


def test_threads(captures) -> None:
    model, failures = copy.deepcopy(MODEL), []
    sampler, reference = fast(model), ReferenceSampler(model, SAMPLING)

    def work(number: int) -> None:
        for i in range(4):
            inputs = (*prompts([5 + number] * (1 + i % 2), number), 10 * number + i)
            if not torch.equal(sampler(*inputs).ids, reference(*inputs).ids):
                failures.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_progress_is_reported_at_the_end(captures) -> None:
    seen = []
    fast(copy.deepcopy(MODEL))(*prompts([4]), 1, progress=lambda *report: seen.append(report))
    assert seen == [("unmask", 4, 4), ("head", 4, 4)]


def uncaptured(case: str) -> tuple[dict, str]:
    """Arguments of a call without a graph, and why."""
    noise = TorchNoise(1, num_tokens=16, codebook_size=64, latent_channels=8)
    return {
        "known": ({"known": Known(torch.full((1, 16), CONFIG.mask_id))}, "the number of open tokens differs"),
        "trace": ({"trace": True}, "a trace was asked for"),
        "noise": ({"noise": noise}, "a graph draws its own noise from seeds, this is a TorchNoise"),
    }[case]


@pytest.mark.parametrize("case", ["known", "trace", "noise"])
def test_what_runs_without_a_graph_says_why(case: str, captures, caplog) -> None:
    arguments, reason = uncaptured(case)
    states, mask = prompts([4])
    call = {"text_states": states, "text_mask": mask, "noise": 3} | arguments
    sampler = fast(copy.deepcopy(MODEL))
    with caplog.at_level(logging.INFO, "dcar_fast.sampling.fast"):
        for _ in range(2):
            sampler(**call)
    assert len([r for r in caplog.records if reason in r.getMessage()]) == 1, "said once"
    assert captures == []
    with pytest.raises(ValueError, match=f"cuda_graph is True, but {reason}"):
        fast(copy.deepcopy(MODEL), cuda_graph=True)(**call)


def test_a_capture_that_fails_is_not_tried_again(captures, monkeypatch, caplog) -> None:
    tried = []

    def fail(recorder, function, inputs):
        tried.append(1)
        raise CaptureError("not permitted")

    monkeypatch.setattr(Recorder, "record", fail)
    model, inputs = copy.deepcopy(MODEL), (*prompts([4]), 1)
    sampler = fast(model)
    for _ in range(2):
        check(sampler(*inputs), ReferenceSampler(model, SAMPLING)(*inputs))
    assert len(tried) == 1 and "sampling without a CUDA graph from now on" in caplog.text
    with pytest.raises(CaptureError, match="not permitted"):
        fast(copy.deepcopy(MODEL), cuda_graph=True)(*inputs)


def test_no_memory_leaves_a_sampler_that_works_on_less(captures) -> None:
    model = copy.deepcopy(MODEL)
    sampler, reference = fast(model), ReferenceSampler(model, SAMPLING)
    sampler(*prompts([4]), 1)
    captures[0].shortages = 2
    with pytest.raises(torch.OutOfMemoryError, match="no memory to capture"):
        sampler(*prompts([4] * 16), 1)
    inputs = (*prompts([4] * 2), 1)
    check(sampler(*inputs), reference(*inputs))


def test_without_a_gpu_insisting_is_an_error() -> None:
    with pytest.raises(ValueError, match="cuda_graph is True, but CUDA graphs need a CUDA device, this is cpu"):
        fast(cuda_graph=True)(*prompts([4]), 1)
    with pytest.raises(ValueError, match="cuda_graph is True, but CUDA graphs need a CUDA device, this is cpu"):
        FastSampler(MODEL, SAMPLING, cuda_graph=True)(*prompts([4]), 1)
    assert fast().warmup() == []


# ---- on a GPU


def on_gpu(dtype: torch.dtype) -> DCAR:
    return copy.deepcopy(MODEL).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16, 19])
@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_replays_equal_eager_calls(batch: int, length: int, backend: str) -> None:
    model = on_gpu(torch.float32)
    states, mask = (t.cuda() for t in prompts([length] * batch))
    eager = FastSampler(model, SAMPLING, backend, cuda_graph=False)(states, mask, 7)
    sampler = FastSampler(model, SAMPLING, backend, cuda_graph=True)
    first, again, other = sampler(states, mask, 7), sampler(states, mask, 7), sampler(states, mask, 8)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.residual, again.residual)
    assert torch.equal(first.ids, eager.ids) and error(first.residual, eager.residual) < 1e-3
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_gpu_and_nothing_is_allocated_in_a_replay(dtype: torch.dtype) -> None:
    sampler = FastSampler(on_gpu(dtype), SAMPLING, cuda_graph=True)
    states, mask = (t.cuda() for t in prompts([20, 10]))
    for seed in range(2):
        sampler(states, mask, seed, lengths=[20, 10])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for seed in range(10):
            sampler(states, mask, seed, lengths=[20, 10])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_tokens() -> None:
    inputs = (*prompts([20, 48, 3]), 5)
    expected = ReferenceSampler(MODEL, SAMPLING)(*inputs)
    found = FastSampler(on_gpu(torch.float32), SAMPLING)(*inputs)
    assert torch.equal(found.ids.cpu(), expected.ids) and error(found.residual.cpu(), expected.residual) < 1e-3
