"""The released generator's ``generate`` on FastSampler: its results, its live weights, none of its defects."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dcar_fast.integrations import accelerate, patch_diffloss
from tests.golden_vectors import MODES, error, recorded_noise, settings, text, vectors
from tests.integrations.mar_family import Diffusion
from tests.integrations.released_generator import ReleasedGenerator, released_generator

PROMPTS = ["a red fox", "two", "a long word!"]
USUAL = {"guidance_scale": 4.5, "randomize_temperature": 1.5, "softmax_temperature_annealing": True}
USUAL |= {"num_sample_steps": 6}


def both(generator, prompts=PROMPTS, **given):
    """What the original and the accelerated one return for a seed, and what torch's generator gives after each."""
    found = []
    for one in (generator, accelerate(generator, compatible=True)):
        torch.manual_seed(11)
        found.append((*one.generate(prompts, **given), torch.rand(1).item()))
    return found


@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
@pytest.mark.parametrize("changes", [{}, {"softmax_temperature_annealing": False}, {"guidance_scale": 1.0}])
def test_a_seed_gives_the_released_results(decay, changes):
    theirs, ours = both(released_generator(), **USUAL | {"guidance_decay": decay} | changes)
    assert torch.equal(ours[0], theirs[0])
    assert error(ours[1], theirs[1]) < 1e-3 and ours[1].dtype == torch.float32
    assert ours[2] == theirs[2]  # as many random numbers were used up


def test_the_defaults_are_the_released_ones():
    theirs, ours = both(released_generator(), ["a"])
    assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) < 1e-3


@pytest.mark.parametrize("open_tokens", [3, 15])
def test_inpainting_gives_the_released_results(open_tokens):
    generator = released_generator()
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (2, 16), generator=draw)
    ids[:, :open_tokens] = generator.mask_token_id
    given = {"init_image_tokens": ids, "init_residual_features": torch.randn(2, 16, 8, generator=draw)}
    given["init_mask"] = torch.rand(2, 16, generator=draw) < 0.5
    theirs, ours = both(generator, PROMPTS[:2], **USUAL, **given)
    assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) < 1e-3
    kept = given["init_mask"]
    assert torch.equal(ours[1][kept], given["init_residual_features"][kept])


@pytest.mark.parametrize("case", [f"generate/{mode}" for mode in MODES])
def test_recorded_vectors(case, monkeypatch):
    recorded, values = vectors("generator"), dict(settings("generator")["generate"][case.split("/")[1]])
    values.pop("head_guidance")
    fast = accelerate(released_generator())
    monkeypatch.setattr(fast.generator, "encode_text", lambda ids: text())
    ids, residual = fast.generate(torch.ones(3, 12, dtype=torch.int64), **values, noise=recorded_noise(case))
    assert torch.equal(ids, recorded[f"{case}/ids"]) and error(residual, recorded[f"{case}/residual"]) < 1e-3


# ---- without the defects


def test_prompts_may_be_token_ids():
    fast = accelerate(released_generator(), compatible=True)
    ids = torch.cat([fast.text_tokenizer(p, "max_length", 12, True, "pt").input_ids for p in PROMPTS])
    found = []
    for condition in (PROMPTS, ids):
        torch.manual_seed(3)
        found.append(fast.generate(condition, **USUAL))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("compatible", [True, False])
def test_every_row_keeps_what_is_known(compatible):
    fast = accelerate(released_generator(), compatible=compatible)
    ids = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(4))
    known = ids.clone()
    for row, count in enumerate((15, 2, 0)):
        ids[row, :count] = fast.mask_token_id
    found, _ = fast.generate(PROMPTS, init_image_tokens=ids, **USUAL)
    here = ids != fast.mask_token_id
    assert torch.equal(found[here], known[here]) and (found < 64).all()


@pytest.mark.parametrize("given", [{"guidance_scale": 0.0}, {"guidance_decay": "linear", "num_sample_steps": 1}])
def test_what_crashes_in_the_released_code_works(given):
    with pytest.raises(UnboundLocalError):
        released_generator().generate(PROMPTS, **USUAL | given)
    ids, residual = accelerate(released_generator()).generate(PROMPTS, **USUAL | given)
    assert (ids < 64).all() and residual.isfinite().all()


def test_images_have_seeds_of_their_own():
    fast = accelerate(released_generator())
    torch.manual_seed(0)
    first = fast.generate(PROMPTS, **USUAL)
    torch.manual_seed(0)
    again = fast.generate(PROMPTS, **USUAL)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    alone = fast.generate(PROMPTS[1:2], **USUAL, noise=[8])
    batch = fast.generate(PROMPTS, **USUAL, noise=[7, 8, 9])
    assert torch.equal(batch[0][1:2], alone[0]) and error(batch[1][1:2], alone[1]) < 1e-3


# ---- the live module


def _trained(generator):
    generator.train()
    logits, _, _ = generator(
        torch.zeros(1, 16, dtype=torch.int64), None, torch.ones(1, 12, 24), torch.ones(1, 12).bool()
    )
    logits.square().sum().backward()
    torch.optim.SGD(generator.parameters(), 1e-3).step()
    generator.eval()


def _data(generator):
    generator.blocks[1].mlp.fc1.weight.data.mul_(1.3)


def _swapped(generator):
    generator.final_layer.linear.weight = nn.Parameter(generator.final_layer.linear.weight.detach().flip(0))


def _table(generator):
    generator.pos_embed.data = generator.pos_embed.data * 0.5


def _scale(generator):
    generator.diffloss.net.cond_embed.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [_trained, _data, _swapped, _table, _scale])
def test_weights_are_those_of_the_moment(change):
    generator = released_generator()
    fast = accelerate(generator, compatible=True)
    torch.manual_seed(11)
    before = fast.generate(PROMPTS, **USUAL)
    change(generator)
    torch.manual_seed(11)
    theirs = generator.generate(PROMPTS, **USUAL)
    torch.manual_seed(11)
    ours = fast.generate(PROMPTS, **USUAL)
    assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) < 1e-3
    assert not (torch.equal(before[0], ours[0]) and torch.equal(before[1], ours[1]))


def test_nothing_is_packed_anew_without_a_change(monkeypatch):
    from dcar_fast.engine import choice

    fast, built = accelerate(released_generator()), []
    engine = choice.PackedEngine
    monkeypatch.setattr(choice, "PackedEngine", lambda *given: built.append(1) or engine(*given))
    for _ in range(3):
        fast.generate(PROMPTS, **USUAL)
    assert len(built) <= 1


def test_it_stands_for_the_generator():
    generator = released_generator()
    fast = accelerate(generator)
    assert fast.eval() is fast and fast.to("cpu") is fast and fast.requires_grad_(False) is fast
    assert fast.mask_token_id == 64 and fast.blocks is generator.blocks and not fast.training
    assert fast.state_dict().keys() == generator.state_dict().keys()
    with pytest.raises(AttributeError):
        _ = fast.nothing_of_this_name
    patch_diffloss(generator)  # both at once
    assert fast.generate(["a"], **USUAL)[0].shape == (1, 16)


# ---- what is refused


def _more(generator):
    generator.extra = nn.Linear(2, 2)


def _less(generator):
    generator.blocks[0].mlp.fc1 = nn.Identity()


def _other_schedule(generator):
    generator.diffloss.gen_diffusion = Diffusion("16,0")


class OtherForward(ReleasedGenerator):
    def forward(self, ids, *given, **named):
        logits, hidden, loss = super().forward(ids, *given, **named)
        return logits, hidden * 1.2, loss


def _other_forward(generator):
    generator.__class__ = OtherForward


REFUSED = {
    "more": (_more, "also has extra.bias, extra.weight"),
    "less": (_less, "is not the released generator: .*'blocks.0.mlp.fc1.weight' is missing"),
    "schedule": (_other_schedule, "not the cosine schedule respaced to 16 steps"),
    "forward": (_other_forward, "computes other hidden states than DC-AR"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_generators_are_refused(what):
    change, reason = REFUSED[what]
    generator = released_generator()
    change(generator)
    with pytest.raises(ValueError, match=reason):
        accelerate(generator)


def test_what_is_no_generator_is_refused():
    with pytest.raises(ValueError, match="generator is a str"):
        accelerate("generator")
    with pytest.raises(ValueError, match="Linear is not the released generator"):
        accelerate(nn.Linear(2, 2))


def test_a_forward_that_cannot_run_is_not_compared_and_that_is_said(monkeypatch, caplog):
    def broken(self, *given, **named):
        raise RuntimeError("needs xformers")

    monkeypatch.setattr(ReleasedGenerator, "forward", broken)
    with caplog.at_level(logging.WARNING, "dcar_fast"):
        fast = accelerate(released_generator())
    assert "was not compared: RuntimeError: needs xformers" in caplog.text
    assert fast.generate(["a"], **USUAL)[0].shape == (1, 16)


def test_layers_that_change_later_are_refused():
    fast = accelerate(released_generator())
    fast.generator.blocks[0].mlp.fc1.register_forward_hook(lambda module, given, out: out * 2)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1 has a forward hook"):
        fast.generate(["a"])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"condition": []}, "condition must be a list of at least one prompt"),
        ({"condition": [1]}, "condition must be a list of at least one prompt"),
        ({"condition": torch.ones(2, 3)}, "condition must be token ids"),
        ({"guidance_decay": "cosine"}, "guidance_decay must be one of"),
        ({"num_sample_steps": 0}, "num_steps must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"init_mask": torch.ones(1, 16).bool()}, "init_mask needs init_image_tokens"),
        ({"init_image_tokens": torch.full((1, 16), 99)}, "99"),
        ({"noise": "x"}, "noise"),
    ],
)
def test_bad_input_is_named(given, reason):
    with pytest.raises(ValueError, match=reason):
        accelerate(released_generator()).generate(**{"condition": ["a"]} | given)


def test_options_that_do_not_exist():
    with pytest.raises(ValueError, match="compatible must be"):
        accelerate(released_generator(), compatible=1)
    with pytest.raises(ValueError, match="backend must be"):
        accelerate(released_generator(), backend="cuda13")
    with pytest.raises(ValueError, match="noise must be None with compatible"):
        accelerate(released_generator(), compatible=True).generate(["a"], noise=1)
