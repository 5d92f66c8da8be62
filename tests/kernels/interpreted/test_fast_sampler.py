"""The whole fast sampler and decoder on Triton kernels, in the interpreter: what a GPU would run, end to end."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dcar_fast.config import DCARConfig, DCHTConfig, SamplingConfig
from dcar_fast.engine.counting import FORMULAS, count
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.engine.fp8 import Float8Engine
from dcar_fast.engine.fused import FusedEngine
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops import _dispatch
from dcar_fast.sampling import FastSampler, ReferenceSampler
from tests.kernels.float8_interpreter import use_torchs_conversion

CONFIG = DCARConfig(
    codebook_size=70,
    latent_channels=4,
    num_tokens=9,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=96,
    text_length=40,
    text_dim=24,
    head_width=48,
    head_depth=2,
    head_steps=3,
)
DECODER = DCHTConfig(
    codebook_size=70,
    latent_channels=4,
    widths=(32, 32, 64),
    encoder_depths=(0, 1, 1),
    decoder_depths=(0, 1, 1),
    blocks=("res", "res", "efficientvit"),
    encoder_norm="layer_norm",
    encoder_act="silu",
    decoder_norms=("batch_norm", "batch_norm", "layer_norm"),
    decoder_acts=("relu", "relu", "silu"),
)


@pytest.fixture(autouse=True)
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the dispatcher take Triton for tensors on the CPU, and kernels be launched without a current device."""
    able = _dispatch.Usable(True, "the interpreter")
    monkeypatch.setattr(_dispatch, "float8_usable", lambda _: able)
    for name, backends in _dispatch._ops.items():
        changed = tuple(replace(b, usable=lambda _: able) if b.name == "triton" else b for b in backends)
        monkeypatch.setitem(_dispatch._ops, name, changed)
        module = sys.modules[f"dcar_fast.ops.{name}"]
        if hasattr(module, "current"):
            monkeypatch.setattr(module, "current", lambda device: nullcontext())
    for cached in (_dispatch._explicit, _dispatch._automatic):
        cached.cache_clear()
    yield
    for cached in (_dispatch._explicit, _dispatch._automatic):
        cached.cache_clear()


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize(("lengths", "width"), [([5, 11], 64), ([3], 128), ([40, 0, 17], 64)])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.0}, {"final_forward": True}])
def test_the_references_tokens(lengths: list[int], width: int, options: dict) -> None:
    """Of width 128 a short prompt absorbs the cross-attention's projections."""
    torch.manual_seed(0)
    model = random_weights(DCAR(replace(CONFIG, hidden_size=width)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    inputs = (torch.randn(*mask.shape, 24), mask, [7, 2**40, 9][: len(lengths)])
    config = SamplingConfig(num_steps=3, **options)
    expected = ReferenceSampler(model, config)(*inputs)
    found = FastSampler(model, config, backend="triton")(*inputs)
    assert torch.equal(found.ids, expected.ids)
    assert (found.residual - expected.residual).abs().max() < 1e-3  # at t = 999 rounding is multiplied by 2e4


def launched(monkeypatch: pytest.MonkeyPatch, function) -> int:
    """How many kernels the interpreter runs."""
    from triton.runtime.interpreter import GridExecutor

    calls, run = [], GridExecutor.__call__

    def counted(self, *arguments, **keywords):
        calls.append(self.fn.__name__)
        return run(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        function()
    return len(calls)


@pytest.mark.parametrize(("length", "width"), [(12, 128), (12, 64), (40, 64)])
def test_the_launches_are_those_that_the_ops_declare(length: int, width: int, monkeypatch) -> None:
    """As ``engine.counting`` adds them up for the launch budgets."""
    model = random_weights(DCAR(replace(CONFIG, hidden_size=width)))
    sampler = FastSampler(model, SamplingConfig(num_steps=2), backend="triton")
    states, mask = torch.randn(1, length, 24), torch.ones(1, length, dtype=torch.bool)

    def sample() -> None:
        sampler(states, mask, 0, lengths=[length])

    sample()  # fills what is kept between calls
    counts = count(sample)
    ours = sum(number for op, number in counts.by_op.items() if op in FORMULAS)
    assert counts.undeclared == set()
    assert launched(monkeypatch, sample) == ours > 30


def test_the_decoders_images() -> None:
    torch.manual_seed(0)
    tokenizer = random_weights(DCHT(DECODER))
    ids, residual = torch.randint(70, (2, 3, 2)), torch.randn(2, 6, 4) / 10
    expected = tokenizer.decode_tokens(ids, residual)
    found = FastDecoder(tokenizer, backend="triton").decode_tokens(ids, residual)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("text", [5, 40])
@torch.no_grad()
def test_hidden_states_in_float8(text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is next to a tie may fall to the other side; it is little beside what float8 changes at all. Float32 for
    everything else: bfloat16 is wrong here."""
    use_torchs_conversion(monkeypatch)
    torch.manual_seed(0)
    model = random_weights(DCAR(replace(CONFIG, hidden_size=128)))
    ids, states = torch.randint(0, 71, (2, 9)), torch.randn(2, text, 24)
    mask = torch.arange(text) < torch.tensor([[3], [text]])

    def hidden(engine: FusedEngine) -> torch.Tensor:
        found = engine.hidden(ids, (3, 3), engine.read(states, mask), True)
        return torch.nn.functional.layer_norm(found, found.shape[-1:])

    found: dict[str, torch.Tensor] = {}
    counts = count(lambda: found.update(triton=hidden(Float8Engine(model, "triton", torch.float32))))
    assert counts.by_op["quantize_rows"] == 2 * 3 + 2 * 3, "inputs, and weights once"
    emulated = hidden(Float8Engine(model, "reference", torch.float32))
    exact = hidden(FusedEngine(model, torch.float32, "triton"))
    error, change = ((x - emulated).square().mean().sqrt().item() for x in (found["triton"], exact))
    assert 0.005 < change < 0.2 and error < change / 10, (error, change)
