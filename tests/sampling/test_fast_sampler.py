"""The fast sampler gives what the reference gives, from the same noise: tokens equal, residuals to rounding."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch

from dcar_fast.config import DCARConfig, SamplingConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import CounterNoise, TorchNoise
from dcar_fast.sampling import Known, ReferenceSampler
from dcar_fast.sampling.fast import FastSampler
from tests.golden_vectors import error, generator, recorded_noise, text

TOKENS, MASK, CODES, CHANNELS, LENGTH = 16, 64, 64, 8, 12
OPTIONS = {
    "default": {},
    "one step": {"num_steps": 1},
    "two steps": {"num_steps": 2},
    "more steps than tokens": {"num_steps": 32},
    "no guidance": {"guidance_scale": 0.0, "num_steps": 5},
    "guidance 1": {"guidance_scale": 1.0, "num_steps": 5},
    "guidance 8": {"guidance_scale": 8.0, "num_steps": 3},
    "linear": {"guidance_schedule": "linear", "num_steps": 4},
    "linear, one step": {"guidance_schedule": "linear", "num_steps": 1},
    "linear 1": {"guidance_schedule": "linear", "guidance_scale": 1.0, "num_steps": 3},
    "power-cosine": {"guidance_schedule": "power-cosine", "guidance_power": 1.2, "num_steps": 5},
    "power-cosine, one step": {"guidance_schedule": "power-cosine", "num_steps": 1},
    "greedy": {"temperature": 0.0, "num_steps": 4},
    "not annealed": {"anneal_softmax": False, "num_steps": 4},
    "final forward": {"final_forward": True, "num_steps": 4},
    "final forward, no guidance": {"final_forward": True, "num_steps": 3, "guidance_scale": 0},
}


both = pytest.mark.parametrize("backend", ["native", "reference"])  # packed linears, and what runs on a GPU


SMALL = DCARConfig(
    codebook_size=32,
    latent_channels=4,
    num_tokens=9,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=64,
    text_length=300,
    text_dim=24,
    head_width=16,
    head_depth=1,
    head_steps=2,
)


@cache
def small() -> DCAR:
    """For many calls."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DCAR(SMALL).eval().requires_grad_(False)


def prompts(rows: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and masks of prompts of different lengths, the first one full, some empty."""
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, LENGTH + 1, (rows,), generator=made)
    lengths[0] = LENGTH
    return torch.randn(rows, LENGTH, 24, generator=made), torch.arange(LENGTH) < lengths[:, None]


def partly_known(rows: int) -> Known:
    """From nothing open to everything, at scattered places."""
    made = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, CODES, (rows, TOKENS), generator=made)
    wanted = torch.linspace(0, TOKENS, rows).round() if rows > 1 else torch.tensor([5])
    places = torch.rand(rows, TOKENS, generator=made).argsort(dim=1)
    return Known(ids.masked_fill(places < wanted[:, None], MASK), torch.randn(rows, TOKENS, CHANNELS, generator=made))


def check(found, expected) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert error(found.residual, expected.residual) < 1e-4
    assert found.residual.dtype == torch.float32 and not found.residual.requires_grad


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("inpainting", [False, True])
@both
def test_equals_the_reference(case: str, rows: int, inpainting: bool, backend: str) -> None:
    config, known = SamplingConfig(**OPTIONS[case]), partly_known(rows) if inpainting else None
    inputs = (*prompts(rows), 5)
    expected = ReferenceSampler(generator(), config)(*inputs, known=known)
    check(FastSampler(generator(), config, backend)(*inputs, known=known), expected)


@both
def test_every_number_of_steps(backend: str) -> None:
    inputs = (*prompts(2), 3)
    for steps in range(1, 33):
        config = SamplingConfig(num_steps=steps)
        check(FastSampler(small(), config, backend)(*inputs), ReferenceSampler(small(), config)(*inputs))


@both
def test_every_batch(backend: str) -> None:
    config = SamplingConfig(num_steps=3)
    for rows in range(1, 18):
        inputs = (*prompts(rows), 3)
        check(FastSampler(small(), config, backend)(*inputs), ReferenceSampler(small(), config)(*inputs))


@both
def test_prompts_of_1_to_300_tokens_in_one_batch(backend: str) -> None:
    """Also some short enough to absorb the projections."""
    config, made = SamplingConfig(num_steps=2), torch.Generator().manual_seed(0)
    for lengths in ([*range(1, 301, 23), 300], [1], [15, 16, 1], [31, 32], [33], [64, 65]):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        inputs = (torch.randn(*mask.shape, 24, generator=made), mask, 1)
        check(FastSampler(small(), config, backend)(*inputs), ReferenceSampler(small(), config)(*inputs))


@both
def test_a_thousand_different_calls_leave_no_memory_behind(backend: str) -> None:
    made = torch.Generator().manual_seed(0)
    sampler = FastSampler(copy.deepcopy(small()), SamplingConfig(num_steps=1), backend)

    def call(i: int) -> None:
        states, mask = (t[:, : 1 + i % LENGTH] for t in prompts(1 + i % 3, seed=i))
        sampler(states, mask, i, grid=(1 + int(torch.randint(4, (1,), generator=made)), 1 + i % 4))

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    for i in range(200):  # fills what is kept, whose size varies a little with what it is of
        call(i)
    before = living()
    for i in range(200, 1200):
        call(i)
    assert living() < before + 100


@pytest.mark.parametrize("grid", [(2, 3), (5, 5), (1, 7), (8, 2)])
@both
def test_other_grids(grid: tuple[int, int], backend: str) -> None:
    for known in (None, Known(torch.full((2, grid[0] * grid[1]), MASK))):
        inputs = (*prompts(2), [3, 2**40])
        expected = ReferenceSampler(generator())(*inputs, known=known, grid=grid)
        check(FastSampler(generator(), backend=backend)(*inputs, known=known, grid=grid), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_short_prompts_absorb_the_projections(length: int) -> None:
    states, mask = (t[:, :length] for t in prompts(4))
    check(FastSampler(generator())(states, mask, 1), ReferenceSampler(generator())(states, mask, 1))


def test_masks_with_holes_and_prompts_in_changing_company() -> None:
    """What is kept of one call serves the next one only where it is the same."""
    sampler, reference = FastSampler(generator()), ReferenceSampler(generator())
    states, _ = prompts(4)
    made = torch.Generator().manual_seed(0)
    for _ in range(6):
        mask = torch.rand(4, LENGTH, generator=made) < 0.5
        check(sampler(states, mask, 2), reference(states, mask, 2))


def test_lengths_from_the_caller_are_the_masks_own() -> None:
    states, mask = prompts(5)
    lengths = mask.sum(dim=1).tolist()
    for _ in range(2):
        check(
            FastSampler(generator())(states, mask, 4, lengths=lengths), ReferenceSampler(generator())(states, mask, 4)
        )
    with pytest.raises(ValueError, match="lengths must have 5 entries, one for each row of text, got 2"):
        FastSampler(generator())(states, mask, 4, lengths=[1, 2])
    for wrong in (-1, 13, 2.0, "1", True):
        with pytest.raises(ValueError, match=r"lengths must be integers in 0\.\.12, got"):
            FastSampler(generator())(states, mask, 4, lengths=[*lengths[:4], wrong])
    with pytest.raises(ValueError, match="lengths must be a list of integers, got int"):
        FastSampler(generator())(states, mask, 4, lengths=5)
    for wrong in (0, 11):  # the first row's is 12
        with pytest.raises(ValueError, match="lengths must be those of text_mask"):
            FastSampler(generator())(states, mask, 4, lengths=[wrong, *lengths[1:]])
    holes = mask.clone()
    holes[0, 3] = False
    with pytest.raises(ValueError, match="lengths must be those of text_mask, None, got"):
        FastSampler(generator())(states, holes, 4, lengths=lengths)


def test_masks_with_holes_are_no_business_of_the_fused_ops() -> None:
    states, mask = prompts(2)
    mask = mask.clone()
    mask[0, 3] = False
    with pytest.raises(ValueError, match="text_mask has rows whose True do not come first, which backend 'reference'"):
        FastSampler(generator(), backend="reference")(states, mask, 4)
    check(FastSampler(generator())(states, mask, 4), ReferenceSampler(generator())(states, mask, 4))


def test_the_environment_chooses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (*prompts(2), 4)
    monkeypatch.setenv("DCAR_FAST_BACKEND", "reference")
    check(FastSampler(generator())(*inputs), ReferenceSampler(generator())(*inputs))
    monkeypatch.setenv("DCAR_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run"):
        FastSampler(generator())(*inputs)


def test_a_model_without_normalised_queries() -> None:
    torch.manual_seed(0)
    model = DCAR(replace(generator().config, qk_norm=False)).eval()
    inputs = (*prompts(2), 4)
    check(FastSampler(model)(*inputs), ReferenceSampler(model)(*inputs))
    with pytest.raises(ValueError, match="backend is 'reference', which needs qk_norm"):
        FastSampler(model, backend="reference")


def test_any_noise() -> None:
    inputs = prompts(3)
    counter = CounterNoise([7, 8, 9], num_tokens=TOKENS, codebook_size=CODES, latent_channels=CHANNELS)
    check(FastSampler(generator())(*inputs, counter), ReferenceSampler(generator())(*inputs, counter))
    recorded, config = recorded_noise("generate/constant"), SamplingConfig(num_steps=6, anneal_softmax=False)
    check(FastSampler(generator(), config)(*text(), recorded), ReferenceSampler(generator(), config)(*text(), recorded))
    drawn = TorchNoise(3, num_tokens=TOKENS, codebook_size=CODES, latent_channels=CHANNELS)
    found = FastSampler(generator())(*inputs, drawn)
    assert found.ids.max() < CODES and found.residual.isfinite().all()


def test_trace_and_progress() -> None:
    inputs, config = (*prompts(3), 1), SamplingConfig(num_steps=4)
    expected = ReferenceSampler(generator(), config)(*inputs, trace=True)
    seen = []
    found = FastSampler(generator(), config)(*inputs, trace=True, progress=lambda *args: seen.append(args))
    check(found, expected)
    for got, want in zip(found.trace, expected.trace, strict=True):
        assert torch.equal(got.ids_in, want.ids_in) and error(got.logits, want.logits) < 1e-4
    assert seen == [("unmask", i, 4) for i in (1, 2, 3, 4)] + [("head", i, 32) for i in range(1, 33)]
    assert FastSampler(generator(), config)(*inputs).trace == []


def changed_in_place(model: DCAR) -> DCAR:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    return model


def loaded(model: DCAR) -> DCAR:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    return model


def assigned(model: DCAR) -> DCAR:
    model.head.cond_embed.weight = torch.nn.Parameter(model.head.cond_embed.weight.detach() * 2)
    return model


def other_data(model: DCAR) -> DCAR:
    model.to_logits.weight.data = model.to_logits.weight.data * 2
    return model


def other_buffer(model: DCAR) -> DCAR:
    model.null_text.mul_(3)
    return model


def written_through_data(model: DCAR) -> DCAR:
    """An EMA swap as many write it; PyTorch counts no version for it."""
    model.to_logits.weight.data.copy_(model.to_logits.weight.data * 2)
    return model


def written_by_numpy(model: DCAR) -> DCAR:
    model.blocks[0].mlp.fc1.weight.detach().numpy()[:] *= 1.5
    return model


def changed_in_inference_mode(model: DCAR) -> DCAR:
    with torch.inference_mode():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    return model


def other_scale(model: DCAR) -> DCAR:
    model.config = dataclasses.replace(model.config, head_scale=2 * model.config.head_scale)
    return model


def other_head_steps(model: DCAR) -> DCAR:
    model.config = dataclasses.replace(model.config, head_steps=model.config.head_steps + 2)
    return model


CHANGES = [
    changed_in_place,
    other_scale,
    other_head_steps,
    loaded,
    assigned,
    other_data,
    other_buffer,
    written_through_data,
    written_by_numpy,
    changed_in_inference_mode,
]


@pytest.mark.parametrize("change", CHANGES)
@both
def test_packed_weights_follow_the_model(change, backend: str) -> None:
    model, inputs = copy.deepcopy(generator()), (*prompts(3), 6)
    sampler = FastSampler(model, backend=backend)
    before = sampler(*inputs)
    check(before, ReferenceSampler(model)(*inputs))
    change(model)
    after = sampler(*inputs)
    check(after, ReferenceSampler(model)(*inputs))
    assert not torch.equal(after.residual, before.residual), "the change changes something"


@both
def test_a_model_made_in_inference_mode(backend: str) -> None:
    """Its tensors have no versions."""
    with torch.inference_mode():
        model = copy.deepcopy(generator())
    inputs, sampler = (*prompts(2), 6), FastSampler(model, backend=backend)
    before = sampler(*inputs)
    check(before, ReferenceSampler(model)(*inputs))
    with torch.inference_mode():
        model.head.cond_embed.weight.mul_(2)
        check(sampler(*inputs), ReferenceSampler(model)(*inputs))


@both
def test_autocast_changes_nothing(backend: str) -> None:
    model, inputs = copy.deepcopy(generator()), (*prompts(2), 6)
    expected = ReferenceSampler(model)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        check(FastSampler(model, backend=backend)(*inputs), expected)
    check(FastSampler(model, backend=backend)(*inputs), expected)


def test_a_model_that_is_gone_takes_its_packed_weights_along() -> None:
    model = copy.deepcopy(generator())
    FastSampler(model)(*prompts(1), 0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_low_precision_of_a_float32_model(dtype: torch.dtype, backend: str) -> None:
    inputs = (*prompts(3), 6)
    found = FastSampler(generator(), backend=backend, dtype=dtype)(*inputs)
    assert found.ids.min() >= 0 and found.ids.max() < CODES and found.residual.abs().max() <= 0.107 + 1e-3
    assert generator().to_logits.weight.dtype == torch.float32
    agreement = (found.ids == ReferenceSampler(generator())(*inputs).ids).float().mean()
    assert agreement > 0.5, f"{agreement:.2f} of the tokens agree with float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "model must be a DCAR, got Linear"),
        ({"config": {}}, "config must be a SamplingConfig, got dict"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16, float16 or float8_e4m3fn, got torch.int8"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'native', 'reference', got 'cuda'"),
        (
            {"backend": "triton"},
            "backend is 'triton', which cannot run fused_linear on cpu: Triton",
        ),
        ({"cuda_graph": 1.5}, "cuda_graph must be 'auto', True or False, got 1.5"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastSampler(**{"model": generator(), **arguments})


class Adapter(torch.nn.Module):
    """A linear layer with something beside it that nobody merged."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


@both
def test_what_packed_weights_would_leave_out_is_refused(backend: str) -> None:
    model = copy.deepcopy(small())
    model.blocks[0].mlp.fc1 = Adapter(model.blocks[0].mlp.fc1)
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.mlp\.fc1 is a Adapter: merge adapters first"):
        FastSampler(model, backend=backend)(*prompts(1), 0)
    model = copy.deepcopy(small())
    model.head.cond_embed.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"model\.head\.cond_embed has a forward hook, which would not run"):
        FastSampler(model, backend=backend)(*prompts(1), 0)


def test_a_float64_model_runs_on_plain_products() -> None:
    model, inputs = copy.deepcopy(small()).double(), (*prompts(2), 1)
    check(FastSampler(model)(*inputs), ReferenceSampler(model)(*inputs))
    with pytest.raises(ValueError, match="the model is float64, which backend 'reference' cannot run: 'native' can"):
        FastSampler(model, backend="reference")(*inputs)
