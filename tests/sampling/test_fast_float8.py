"""The fast sampler with qkv, fc1 and fc2 in float8: against the same in plain PyTorch, and against float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast import DCARPipeline
from dcar_fast.config import SamplingConfig
from dcar_fast.engine import choice
from dcar_fast.engine.choice import Choice
from dcar_fast.engine.fp8 import FLOAT8, Float8Engine
from dcar_fast.models.dcar import DCAR
from dcar_fast.ops import _dispatch
from dcar_fast.sampling import FastSampler, ReferenceSampler
from tests.golden_vectors import generator
from tests.ops.float8_cases import nearest
from tests.sampling.test_fast_sampler import changed_in_place, loaded, other_data, prompts, small

SEEDS = range(6)


def dequantised(x: Tensor) -> Tensor:
    """Rows (..., K) as float8 with a scale each has them, without PyTorch's conversion."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    scale = torch.where(scale == 0, 1.0, scale)
    return (nearest((x / scale).double()) * scale.double()).float()


class Emulated(nn.Module):
    """A linear layer in float8 on both sides, multiplied in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(dequantised(layer.weight.detach())), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(dequantised(x), self.weight, self.bias)


def emulation(model: DCAR) -> DCAR:
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.self_attn.qkv = Emulated(block.self_attn.qkv)
        block.mlp.fc1, block.mlp.fc2 = Emulated(block.mlp.fc1), Emulated(block.mlp.fc2)
    return model


MODELS: dict[str, Callable[[], DCAR]] = {"golden": generator, "small": small}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def agreement(one: Callable[..., object], other: Callable[..., object]) -> float:
    """The share of equal ids of two samplers, over a few runs."""
    same = [(one(*prompts(3), seed).ids == other(*prompts(3), seed).ids).float().mean() for seed in SEEDS]
    return torch.stack(same).mean().item()


@models
@torch.no_grad()
def test_hidden_states_are_those_of_the_emulation(model: Callable[[], DCAR]) -> None:
    """With float32 for everything else. What is next to a tie may fall to the other side; it is little beside what
    float8 changes at all."""
    states, mask = prompts(3)
    config = model().config
    ids = torch.randint(0, config.codebook_size, (3, config.num_tokens), generator=torch.Generator().manual_seed(1))
    ids[:, ::2] = config.mask_id

    def hidden(engine: Float8Engine) -> Tensor:
        return engine.hidden(ids, config.grid, engine.read(states, mask), True)

    inputs = (ids.repeat(2, 1), states.repeat(2, 1, 1), mask.repeat(2, 1), torch.arange(6) >= 3, config.grid)
    want, exact = (m(*inputs).hidden for m in (emulation(model()), model()))
    got = hidden(Float8Engine(model(), "reference", torch.float32))
    got, want, exact = (F.layer_norm(x, x.shape[-1:]) for x in (got, want, exact))
    error, change = ((x - want).square().mean().sqrt().item() for x in (got, exact))
    assert 0.005 < change < 0.2 and error < change / 10, (error, change)


@models
def test_tokens_are_those_of_the_emulation(model: Callable[[], DCAR], monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 for everything else all but near ties, with bfloat16 for everything else most."""
    emulated = ReferenceSampler(emulation(model()))
    assert agreement(FastSampler(model(), backend="reference", dtype=FLOAT8), emulated) > 0.75
    monkeypatch.setattr(choice, "Float8Engine", partial(Float8Engine, dtype=torch.float32))
    assert agreement(FastSampler(copy.deepcopy(model()), backend="reference", dtype=FLOAT8), emulated) > 0.95


@models
def test_float8_of_a_float32_model(model: Callable[[], DCAR]) -> None:
    """Random weights, whose logits are flat; 0.78 and 0.86 measured over eight seeds, and 0.92 and 0.96 in bfloat16."""
    eight = agreement(FastSampler(model(), backend="reference", dtype=FLOAT8), ReferenceSampler(model()))
    assert 0.65 < eight < 0.95
    found = FastSampler(model(), backend="reference", dtype=FLOAT8)(*prompts(3), 1)
    assert found.residual.dtype == torch.float32 and found.residual.isfinite().all()


@pytest.mark.parametrize("options", [{"guidance_scale": 0.0}, {"final_forward": True}, {"num_steps": 1}])
@pytest.mark.parametrize("length", [1, 5, 12])
def test_every_kind_of_call(options: dict, length: int) -> None:
    """Absorbed projections and not; whatever the hidden states are of."""
    config = SamplingConfig(**{"num_steps": 3, **options})
    states, mask = (t[:, :length] for t in prompts(4))
    sampler = FastSampler(small(), config, "reference", FLOAT8)
    found, expected = sampler(states, mask, 3), ReferenceSampler(small(), config)(states, mask, 3)
    assert (found.ids == expected.ids).float().mean() > 0.5
    assert torch.equal(sampler(states, mask, 3, lengths=mask.sum(1).tolist()).ids, found.ids)


@pytest.mark.parametrize("change", [changed_in_place, loaded, other_data])
def test_packed_weights_follow_the_model(change: Callable[[DCAR], DCAR]) -> None:
    model = copy.deepcopy(generator())
    sampler = FastSampler(model, backend="reference", dtype=FLOAT8)
    before = sampler(*prompts(3), 6)
    change(model)
    after, fresh = sampler(*prompts(3), 6), FastSampler(copy.deepcopy(model), backend="reference", dtype=FLOAT8)
    assert not torch.equal(after.residual, before.residual)
    assert torch.equal(after.residual, fresh(*prompts(3), 6).residual)


def test_weights_are_quantised_from_the_models_own_precision() -> None:
    engine = Choice(generator(), "reference", FLOAT8).engine(prefix=True)
    assert engine.dtype == torch.bfloat16 and engine.blocks[0].proj.weight.dtype == torch.bfloat16
    layer, weight = engine.blocks[0].fc1, generator().blocks[0].mlp.fc1.weight
    assert weight.dtype == torch.float32 and layer.weight.dtype == FLOAT8
    assert torch.equal(layer.weight.float() * layer.scale[:, None], dequantised(weight.detach()))


NEEDS = "fp8 needs a GPU of compute capability 8.9 or newer, this is"
EMULATES = "; backend='reference' emulates it"


@pytest.mark.parametrize("backend", ["auto", "triton", "native"])
def test_refused_without_a_gpu(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{NEEDS} cpu{EMULATES}"):
        FastSampler(generator(), backend=backend, dtype=FLOAT8)
    with pytest.raises(ValueError, match=f"{NEEDS} meta{EMULATES}"):
        FastSampler(copy.deepcopy(generator()).to("meta"), backend=backend, dtype=FLOAT8)


def test_refused_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a new one where a backend or a mask cannot be; both are made up."""
    monkeypatch.setattr(Choice, "device", torch.device("cuda", 0))
    old = _dispatch.Usable(False, "float8 needs compute capability (8, 9), cuda:0 has (8, 0)")
    monkeypatch.setattr(choice, "float8_usable", lambda _: old)
    with pytest.raises(ValueError, match=rf"{NEEDS} cuda \(float8 needs .*\(8, 0\)\){EMULATES}"):
        Choice(generator(), "auto", FLOAT8)
    monkeypatch.setattr(choice, "float8_usable", lambda _: _dispatch.Usable(True, "yes"))
    with pytest.raises(ValueError, match="backend is 'native', which has no fp8"):
        Choice(generator(), "native", FLOAT8)
    with pytest.raises(ValueError, match="text_mask has rows whose True do not come first, which dtype float8_e4m3fn"):
        Choice(generator(), "auto", FLOAT8).engine(prefix=False)
    plain = DCAR(replace(generator().config, qk_norm=False))
    with pytest.raises(ValueError, match="dtype is float8_e4m3fn, which needs qk_norm"):
        Choice(plain, "auto", FLOAT8)


def test_the_environment_asks_for_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCAR_FAST_BACKEND", "reference")
    found = FastSampler(generator(), dtype=FLOAT8)(*prompts(2), 4)
    assert torch.equal(found.ids, FastSampler(generator(), backend="reference", dtype=FLOAT8)(*prompts(2), 4).ids)


@cache
def pipeline() -> DCARPipeline:
    return DCARPipeline.from_preset("shapes", seed=0, device="cpu")


def test_a_pipeline_samples_in_float8_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, how = pipeline(), {"seed": 3, "num_steps": 2, "height": 32, "width": 32, "progress": False}
    with pytest.raises(ValueError, match=f"{NEEDS} cpu{EMULATES}"):
        pipe.sampler_dtype = FLOAT8
    assert pipe.sampler_dtype is None
    (before,) = pipe("a", **how)
    monkeypatch.setenv("DCAR_FAST_BACKEND", "reference")
    pipe.sampler_dtype = FLOAT8
    try:
        (eight,) = pipe("a", **how)
        assert eight.tobytes() != before.tobytes() and '"sampler_dtype": "float8_e4m3fn"' in eight.info["settings"]
        text = pipe.encode_text(["a"])
        want = FastSampler(pipe.generator, dtype=FLOAT8)(text.states, text.mask, 3)
        assert torch.equal(pipe.generate(text, 3).ids, want.ids)
        pipe.engine = "reference"
        with pytest.raises(ValueError, match="sampler_dtype is torch.float8_e4m3fn, which engine 'reference' does not"):
            pipe("a", **how)
        with pytest.raises(ValueError, match="dtype must be float32"):
            pipe.sampler_dtype = torch.int8
    finally:
        pipe.engine, pipe.sampler_dtype = "fast", None
    assert "sampler_dtype" not in before.info["settings"]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_emulation_gives() -> None:
    """In a graph and without; the emulation on the same GPU."""
    usable = _dispatch.float8_usable(torch.device("cuda", 0))
    if not usable.ok:
        pytest.skip(usable.reason)
    model = copy.deepcopy(generator()).cuda()
    emulated = FastSampler(model, backend="reference", dtype=FLOAT8)

    def sampled(sampler: FastSampler, seed: int):
        return sampler(*(t.cuda() for t in prompts(3)), seed)

    for graph in (False, True):
        sampler = FastSampler(model, dtype=FLOAT8, cuda_graph=graph)
        same = [(sampled(sampler, s).ids == sampled(emulated, s).ids).float().mean().item() for s in SEEDS]
        assert sum(same) / len(same) > 0.75, same
