"""The sampler against an independent one, and its promises about seeds, known tokens, grids and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast.config import SamplingConfig
from dcar_fast.models.dcar import DCAR, Output
from dcar_fast.noise import CounterNoise, RecordedNoise
from dcar_fast.profiling import record_stages
from dcar_fast.sampling import Known, ReferenceSampler
from tests.golden_vectors import error, generator, recorded_noise, text
from tests.sampling import oracle

MASK, CODES, CHANNELS = 64, 64, 8


def prompts(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and masks of ``rows`` different prompts of different lengths."""
    made = torch.Generator().manual_seed(9)
    states = torch.randn(rows, 12, 24, generator=made)
    lengths = torch.tensor([5, 12, 1, 7, 3])[torch.arange(rows) % 5]
    return states, torch.arange(12) < lengths[:, None]


def counter(seeds: list[int], tokens: int = 16) -> CounterNoise:
    return CounterNoise(seeds, num_tokens=tokens, codebook_size=CODES, latent_channels=CHANNELS)


def sample(seeds, rows: int = 3, known=None, grid=None, **options):
    return ReferenceSampler(generator(), SamplingConfig(**options))(
        *prompts(rows), seeds, known=known, grid=grid, trace=True
    )


def check(found, seeds: list[int], config: SamplingConfig, ids=None, grid=None, residual_to: float = 1e-4) -> None:
    tokens = found.ids.shape[1]
    noise, (states, mask) = counter(seeds, tokens), prompts(len(seeds))
    for b in range(len(seeds)):
        history, residual = oracle.sample_image(generator(), config, states, mask, noise, b, ids, grid)
        for s, step in enumerate(found.trace):
            assert step.ids_in[b].tolist() == history[s], f"image {b}, step {s}"
        assert found.ids[b].tolist() == history[-1]
        assert error(found.residual[b], residual) < residual_to


OPTIONS = {
    "default": {},
    "one step": {"num_steps": 1},
    "two steps": {"num_steps": 2},
    "more steps than tokens": {"num_steps": 23},
    "no guidance": {"guidance_scale": 0.0, "num_steps": 5},
    "guidance 1": {"guidance_scale": 1.0, "num_steps": 5},
    "guidance 1, one step": {"guidance_scale": 1, "num_steps": 1},
    "integer guidance": {"guidance_scale": 3, "num_steps": 4},
    "linear": {"guidance_schedule": "linear", "num_steps": 4},
    "linear, one step": {"guidance_schedule": "linear", "num_steps": 1},
    "linear 0": {"guidance_schedule": "linear", "guidance_scale": 0, "num_steps": 3},
    "linear 1": {"guidance_schedule": "linear", "guidance_scale": 1.0, "num_steps": 3},
    "power-cosine": {"guidance_schedule": "power-cosine", "guidance_power": 1.2, "num_steps": 5},
    "power-cosine, one step": {"guidance_schedule": "power-cosine", "num_steps": 1},
    "power-cosine 1": {"guidance_schedule": "power-cosine", "guidance_scale": 1.0, "num_steps": 3},
    "power-cosine 0": {"guidance_schedule": "power-cosine", "guidance_scale": 0.0, "num_steps": 3},
    "greedy": {"temperature": 0.0, "num_steps": 4},
    "hot, not annealed": {"temperature": 9.0, "anneal_softmax": False, "num_steps": 4},
    "final forward": {"final_forward": True, "num_steps": 4},
    "final forward, no guidance": {"final_forward": True, "num_steps": 3, "guidance_scale": 0},
    "final forward, linear, one step": {"final_forward": True, "num_steps": 1, "guidance_schedule": "linear"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_generation_step_by_step(case):
    seeds = [5, 2**40 + 3, 0]
    found = sample(seeds, **OPTIONS[case])
    check(found, seeds, SamplingConfig(**OPTIONS[case]))
    assert found.ids.min() >= 0 and found.ids.max() < CODES, "nothing stays masked"
    assert found.residual.abs().max() <= 0.107 + 1e-6


OPEN = torch.tensor([16, 3, 1, 0, 9])


def partly_known() -> tuple[torch.Tensor, torch.Tensor]:
    """ids (5, 16) with 16, 3, 1, 0 and 9 open tokens at scattered places, and residuals."""
    made = torch.Generator().manual_seed(2)
    ids = torch.randint(0, CODES, (5, 16), generator=made)
    places = torch.rand(5, 16, generator=made).argsort(dim=1)
    return ids.masked_fill(places < OPEN[:, None], MASK), torch.randn(5, 16, CHANNELS, generator=made)


@pytest.mark.parametrize("schedule_tokens", ["open", "all"])
@pytest.mark.parametrize(
    "options", [{"num_steps": 6}, {"num_steps": 3, "guidance_scale": 0}, {"num_steps": 1}], ids=str
)
def test_rows_with_different_open_counts(schedule_tokens, options):
    ids, residual = partly_known()
    options = {**options, "schedule_tokens": schedule_tokens}
    seeds = [4, 5, 6, 7, 8]
    found = sample(seeds, 5, Known(ids), **options)
    check(found, seeds, SamplingConfig(**options), ids)
    decided = ids != MASK
    for step in found.trace:
        assert torch.equal(step.ids_in[decided], ids[decided])
    assert torch.equal(found.ids[decided], ids[decided])
    assert torch.equal(found.ids[3], ids[3]), "nothing was open"
    assert (found.ids != MASK).all()
    for step, after in zip(found.trace, [*(t.ids_in for t in found.trace[1:]), found.ids], strict=True):
        assert not ((step.ids_in != MASK) & (after != step.ids_in)).any(), "decided tokens stay decided"


def test_open_counts_decide_the_schedule():
    ids, _ = partly_known()
    spread = {
        kind: [
            (step.ids_in[4] == MASK).sum().item()
            for step in sample(0, 5, Known(ids), num_steps=6, schedule_tokens=kind).trace
        ]
        for kind in ("open", "all")
    }
    assert spread == {"open": [9, 8, 7, 6, 4, 3], "all": [9, 8, 7, 6, 5, 4]}


def test_keep_chooses_residuals_and_nothing_else():
    ids, residual = partly_known()
    decided = ids != MASK
    free = sample(0, 5, Known(ids), num_steps=3)
    by_default = sample(0, 5, Known(ids, residual), num_steps=3)
    made = torch.Generator().manual_seed(5)
    some = torch.rand(5, 16, generator=made) < 0.5
    none, every = torch.zeros(5, 16, dtype=torch.bool), torch.ones(5, 16, dtype=torch.bool)
    for keep, found in (
        (decided, by_default),
        (none, sample(0, 5, Known(ids, residual, none), num_steps=3)),
        (every, sample(0, 5, Known(ids, residual, every), num_steps=3)),
        (some, sample(0, 5, Known(ids, residual, some), num_steps=3)),
    ):
        assert torch.equal(found.ids, free.ids), "ids do not depend on keep"
        assert torch.equal(found.residual[keep], residual[keep])
        assert torch.equal(found.residual[~keep], free.residual[~keep])


def test_kept_residuals_of_another_precision():
    ids, residual = partly_known()
    found = sample(0, 5, Known(ids, residual.half(), torch.ones(5, 16, dtype=torch.bool)), num_steps=1)
    assert torch.equal(found.residual, residual.half().float()) and found.residual.dtype == torch.float32


def test_everything_known():
    ids = partly_known()[0].remainder(CODES)
    found = sample(0, 5, Known(ids), num_steps=4)
    assert torch.equal(found.ids, ids)
    assert all(torch.equal(step.ids_in, ids) for step in found.trace)
    assert found.residual.isfinite().all()


def test_all_open_is_plain_generation():
    plain = sample(3, 5, num_steps=4)
    found = sample(3, 5, Known(torch.full((5, 16), MASK)), num_steps=4)
    assert torch.equal(plain.ids, found.ids) and torch.equal(plain.residual, found.residual)


def test_the_given_tensors_stay_as_they_are():
    ids, residual = partly_known()
    given = ids.clone(), residual.clone()
    states, mask = prompts(5)
    sample(0, 5, Known(ids, residual), num_steps=2)
    assert torch.equal(ids, given[0]) and torch.equal(residual, given[1])
    assert torch.equal(prompts(5)[0], states)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (3, 5), (1, 7), (5, 5), (1, 1)])
def test_grids(grid):
    options = {"num_steps": 3}
    found = sample([1, 2], 2, grid=grid, **options)
    assert found.ids.shape == (2, grid[0] * grid[1])
    check(found, [1, 2], SamplingConfig(**options), grid=grid)


def test_known_tokens_bring_their_own_square_grid():
    ids = torch.full((2, 9), MASK)
    ids[:, 4] = 7
    options = {"num_steps": 3}
    found = sample([1, 2], 2, Known(ids), **options)
    check(found, [1, 2], SamplingConfig(**options), ids, grid=(3, 3))
    ids = torch.full((2, 6), MASK)
    found = sample([1, 2], 2, Known(ids), grid=(2, 3), **options)
    check(found, [1, 2], SamplingConfig(**options), ids, grid=(2, 3))


def test_an_image_depends_on_its_seed_alone():
    seeds = [11, 2**50, 11, 0, 2**63 - 1]
    ids = partly_known()[0]
    for known in (None, Known(ids)):
        together = sample(seeds, 5, known)
        states, mask = prompts(5)
        for b, seed in enumerate(seeds):
            one = slice(b, b + 1)
            alone = ReferenceSampler(generator())(
                states[one], mask[one], [seed], known=None if known is None else Known(ids[one])
            )
            assert torch.equal(alone.ids, together.ids[one])
            assert error(alone.residual, together.residual[one]) < 1e-5
    order = [3, 0, 4, 2, 1]
    states, mask = prompts(5)
    shuffled = ReferenceSampler(generator())(states[order], mask[order], [seeds[b] for b in order])
    assert torch.equal(shuffled.ids, sample(seeds, 5).ids[order])


def test_seeds():
    by_list, by_first = sample([7, 8, 9]), sample(7)
    assert torch.equal(by_list.ids, by_first.ids) and torch.equal(by_list.residual, by_first.residual)
    assert torch.equal(by_list.ids, sample(counter([7, 8, 9])).ids)
    again = sample(7)
    assert torch.equal(again.residual, by_first.residual)
    assert not torch.equal(sample(8).ids, by_first.ids)


def test_a_zero_temperature_ignores_the_token_and_confidence_noise():
    quiet, other = (sample(seed, temperature=0.0, num_steps=5) for seed in (1, 77))
    assert torch.equal(quiet.ids, other.ids)
    assert not torch.equal(quiet.residual, other.residual), "the residuals still depend on the seed"


def test_the_last_step_is_greedy():
    found = sample(0)
    last = found.trace[-1]
    cond, uncond = last.logits.chunk(2)
    best = (cond + 4.5 * (cond - uncond)).argmax(-1)
    assert torch.equal(found.ids, torch.where(last.ids_in == MASK, best, last.ids_in))


def test_final_forward_changes_residuals_only():
    plain, final = sample(0), sample(0, final_forward=True)
    assert torch.equal(plain.ids, final.ids) and len(final.trace) == 12
    assert error(plain.residual, final.residual) > 1e-3


def test_trace():
    found = sample(0, num_steps=4, guidance_schedule="linear")
    assert [step.logits.shape[0] for step in found.trace] == [3, 6, 6, 6], "no unconditional pass in linear's step 0"
    unguided = sample(0, num_steps=4, guidance_scale=0)
    assert [step.logits.shape[0] for step in unguided.trace] == [3] * 4
    states, mask = prompts(3)
    for step in found.trace:
        for half in range(step.logits.shape[0] // 3):
            flags = torch.full((3,), bool(half))
            with torch.no_grad():
                raw = generator()(step.ids_in, states, mask, flags).logits
            assert error(step.logits[3 * half : 3 * half + 3], raw) < 1e-5
    assert (found.trace[0].ids_in == MASK).all()
    silent = ReferenceSampler(generator(), SamplingConfig(num_steps=4))(states, mask, 0)
    assert silent.trace == []


class Counting(torch.nn.Module):
    """A model that counts its forwards and how many rows they had."""

    def __init__(self, model: DCAR) -> None:
        super().__init__()
        self.inner, self.config, self.head = model, model.config, model.head
        self.token_embedding, self.rows = model.token_embedding, []

    def forward(self, ids, *args) -> Output:
        self.rows.append(len(ids))
        return self.inner(ids, *args)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [6, 6, 6]),
        ({"final_forward": True}, [6, 6, 6, 6]),
        ({"guidance_scale": 0}, [3, 3, 3]),
        ({"guidance_scale": 0, "final_forward": True}, [3, 3, 3, 3]),
        ({"guidance_scale": 1, "final_forward": True}, [6, 6, 6, 3]),
        ({"guidance_schedule": "linear"}, [3, 6, 6]),
        ({"guidance_schedule": "linear", "num_steps": 1}, [6]),
        ({"guidance_schedule": "linear", "num_steps": 1, "final_forward": True}, [3, 6]),
    ],
    ids=str,
)
def test_no_forward_too_many(options, rows):
    model = Counting(generator())
    ReferenceSampler(model, SamplingConfig(**{"num_steps": 3, **options}))(*prompts(3), 0)
    assert model.rows == rows


def test_progress_and_stages():
    seen = []
    with record_stages() as times:
        ReferenceSampler(generator(), SamplingConfig(num_steps=3, final_forward=True))(
            *prompts(2), 0, progress=lambda *args: seen.append(args)
        )
    assert seen == [("unmask", i, 3) for i in (1, 2, 3)] + [("head", i, 32) for i in range(1, 33)]
    assert set(times.seconds) == {"unmask", "final_forward", "head"}


class Patched(Counting):
    """A model whose logits are changed by ``change(logits, ids)`` before they leave it."""

    def __init__(self, model: DCAR, change) -> None:
        super().__init__(model)
        self.change = change

    def forward(self, ids, *args) -> Output:
        out = self.inner(ids, *args)
        return Output(self.change(out.logits.clone(), ids), out.hidden)


def some_nan(logits, ids):
    logits[:, ::3, ::2] = math.nan
    return logits


def rows_of_nan(logits, ids):
    logits[:, ::2] = math.nan
    return logits


def infinite(logits, ids):
    logits[: len(ids) // 2, :, 5] = math.inf  # the conditional half
    return logits


def minus_infinite(logits, ids):
    logits[:] = -math.inf
    return logits


@pytest.mark.parametrize("change", [some_nan, rows_of_nan, infinite, minus_infinite])
@pytest.mark.parametrize("guidance", [4.5, 0.0])
def test_logits_that_are_no_numbers(change, guidance):
    ids, residual = partly_known()
    config = SamplingConfig(num_steps=6, guidance_scale=guidance)
    for known in (None, Known(ids, residual)):
        before = torch.full((5, 16), MASK) if known is None else ids
        found = ReferenceSampler(Patched(generator(), change), config)(*prompts(5), 0, known=known, trace=True)
        assert found.ids.min() >= 0 and found.ids.max() < CODES
        assert torch.equal(found.ids[before != MASK], before[before != MASK])
        assert found.residual.isfinite().all()
        for s, step in enumerate(found.trace):
            still = (step.ids_in == MASK).sum(dim=1).tolist()
            assert still == planned(config, before, s), "the counts do not depend on the logits"


def planned(config: SamplingConfig, ids: torch.Tensor, step: int) -> list[int]:
    masked = (ids == MASK).sum(dim=1).tolist()
    totals = list(masked)
    for s in range(step):
        masked = [oracle.masked_after(config, s, t, m) for t, m in zip(totals, masked, strict=True)]
    return masked


def test_infinite_confidence_of_open_tokens_masks_no_known_one():
    """An open token may be as confident as a known one: known ones must not use up the positions to mask."""

    def change(logits, ids):
        logits[..., 5] = math.inf
        return logits

    ids = torch.full((1, 16), MASK)
    ids[0, :4] = torch.arange(4)  # in front, where ties are broken in favour of masking
    config = SamplingConfig(num_steps=6, guidance_scale=0)
    found = ReferenceSampler(Patched(generator(), change), config)(*prompts(1), 0, known=Known(ids), trace=True)
    assert [(step.ids_in == MASK).sum().item() for step in found.trace] == [
        planned(config, ids, s)[0] for s in range(6)
    ]
    assert found.ids[0, :4].tolist() == [0, 1, 2, 3]
    assert (found.ids[0, 4:] == 5).all()


def test_recordings_longer_than_needed():
    noise = recorded_noise("generate/constant")
    longer = RecordedNoise(
        [noise.token(s) for s in range(6)],
        [noise.confidence(s) for s in range(5)],  # the last step masks nothing and draws none
        noise.latent_init(),
        [noise.latent(i) for i in range(32)],
    )
    config = SamplingConfig(num_steps=6, anneal_softmax=False)
    with_all = ReferenceSampler(generator(), config)(*text(), noise)
    assert torch.equal(ReferenceSampler(generator(), config)(*text(), longer).ids, with_all.ids)
    short = SamplingConfig(num_steps=2, anneal_softmax=False)
    assert ReferenceSampler(generator(), short)(*text(), noise).ids.max() < CODES


def test_low_precision_noise_recordings_are_taken_as_float32():
    noise = recorded_noise("generate/constant")
    double = RecordedNoise(
        [noise.token(s).double() for s in range(6)],
        [noise.confidence(s).double() for s in range(6)],
        noise.latent_init().double(),
        [noise.latent(i).double() for i in range(32)],
    )
    config = SamplingConfig(num_steps=6, anneal_softmax=False)
    expected = ReferenceSampler(generator(), config)(*text(), noise)
    found = ReferenceSampler(generator(), config)(*text(), double)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.residual, expected.residual)


def test_states_of_another_precision():
    states, mask = prompts(2)
    a = ReferenceSampler(generator(), SamplingConfig(num_steps=2))(states.half(), mask, 0)
    b = ReferenceSampler(generator(), SamplingConfig(num_steps=2))(states.half().float(), mask, 0)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.residual, b.residual)


def test_gradients_are_off_and_the_model_is_left_alone():
    before = {name: value.clone() for name, value in generator().state_dict().items()}
    found = sample(0, num_steps=2)
    assert not found.residual.requires_grad
    for name, value in generator().state_dict().items():
        assert torch.equal(value, before[name])


IDS, RESIDUAL = torch.full((3, 16), MASK), torch.zeros(3, 16, CHANNELS)
BAD = {
    "states width": ("text_states", {"text_states": torch.zeros(3, 12, 23)}),
    "states rank": ("text_states", {"text_states": torch.zeros(12, 24)}),
    "states too long": ("text_states", {"text_states": torch.zeros(3, 13, 24)}),
    "states integer": ("text_states", {"text_states": torch.zeros(3, 12, 24, dtype=torch.int64)}),
    "states none": ("text_states", {"text_states": None}),
    "no rows": (
        "text_states",
        {"text_states": torch.zeros(0, 12, 24), "text_mask": torch.zeros(0, 12).bool()},
    ),
    "mask shape": ("text_mask", {"text_mask": torch.ones(3, 11, dtype=torch.bool)}),
    "mask rows": ("text_mask", {"text_mask": torch.ones(2, 12, dtype=torch.bool)}),
    "mask dtype": ("text_mask", {"text_mask": torch.ones(3, 12)}),
    "noise batch": ("noise", {"noise": [1, 2]}),
    "noise negative": ("noise", {"noise": -5}),
    "noise text": ("noise", {"noise": "5"}),
    "noise float": ("noise", {"noise": 5.0}),
    "noise none": ("noise", {"noise": None}),
    "noise of other sizes": ("noise", {"noise": counter([1, 2, 3], 15)}),
    "recording too short": ("noise", {"noise": RecordedNoise([], [], torch.zeros(3, 16, 8), [])}),
    "grid product": ("known.ids", {"grid": (3, 5), "known": Known(IDS)}),
    "grid zero": ("grid", {"grid": (0, 4)}),
    "grid negative": ("grid", {"grid": (-4, -4)}),
    "grid fraction": ("grid", {"grid": (4.5, 4)}),
    "grid not a number": ("grid", {"grid": (math.nan, 4)}),
    "grid one": ("grid", {"grid": (4,)}),
    "grid number": ("grid", {"grid": 4}),
    "grid three": ("grid", {"grid": (4, 4, 1)}),
    "grid text": ("grid", {"grid": "ab"}),
    "known ids out of range": ("known.ids", {"known": Known(IDS + 1)}),
    "known ids negative": ("known.ids", {"known": Known(IDS - 65)}),
    "known ids dtype": ("known.ids", {"known": Known(IDS.int())}),
    "known ids batch": ("known.ids", {"known": Known(IDS[:2])}),
    "known ids rank": ("known.ids", {"known": Known(IDS.view(3, 4, 4))}),
    "known ids none": ("known.ids", {"known": Known(None)}),
    "known no square": ("grid", {"known": Known(IDS[:, :15])}),
    "known residual shape": ("known.residual", {"known": Known(IDS, RESIDUAL[:, :15])}),
    "known residual channels": ("known.residual", {"known": Known(IDS, RESIDUAL[..., :7])}),
    "known residual dtype": ("known.residual", {"known": Known(IDS, RESIDUAL.long())}),
    "keep shape": ("known.keep", {"known": Known(IDS, RESIDUAL, torch.ones(3, 15, dtype=torch.bool))}),
    "keep dtype": ("known.keep", {"known": Known(IDS, RESIDUAL, torch.ones(3, 16))}),
    "keep alone": ("known.keep", {"known": Known(IDS, None, torch.ones(3, 16, dtype=torch.bool))}),
    "known of another type": ("known", {"known": {"ids": IDS}}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_before_any_work(case):
    name, changes = BAD[case]
    states, mask = prompts(3)
    model = Counting(generator())
    with pytest.raises(ValueError, match=name):
        ReferenceSampler(model)(**{"text_states": states, "text_mask": mask, "noise": 0, **changes})
    assert model.rows == [], "nothing was computed"
