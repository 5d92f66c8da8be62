"""A patched diffusion head samples as the original does, follows its module, and is refused where not understood."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from dcar_fast.integrations import explain, patch_diffloss, unpatch
from dcar_fast.integrations._structure import Unrecognised
from tests.golden_vectors import HEADS, error, released_state, settings, vectors
from tests.integrations.mar_family import (
    Diffusion,
    HartDiffLoss,
    HartNet,
    MarDiffLoss,
    MarNet,
    MeanType,
    VarType,
    randomise,
)

CHANNELS, CONDITION = 8, 24
SIZES = {"target_channels": CHANNELS, "z_channels": CONDITION, "depth": 2, "width": 32}
KINDS = {
    "mar": lambda: MarDiffLoss(**SIZES, num_sampling_steps="12,0"),
    "hart": lambda: HartDiffLoss(**SIZES, num_sampling_steps="9"),
    "dcar": lambda: HartDiffLoss(**SIZES, num_sampling_steps="9", vae_scale=0.107),
}


class Model(nn.Module):
    """Something that holds a head, and parameters of its own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.heads = nn.ModuleDict({"residual": head})


def make(kind: str = "mar") -> nn.Module:
    return randomise(KINDS[kind]())


def condition(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, CONDITION, generator=torch.Generator().manual_seed(seed))


def draw(head: nn.Module, rows: int = 6, cfg: float = 2.5, temperature: float = 1.0) -> tuple[torch.Tensor, float]:
    """The samples, and what torch's generator gives after them."""
    torch.manual_seed(5)
    return head.sample(condition(rows), temperature, cfg), torch.rand(1).item()


def original(head: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
    torch.manual_seed(5)
    return type(head).sample(head, *args, **kwargs)


# ---- the same samples


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("cfg", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_samples_it_gave_before(kind, cfg, temperature):
    head = make(kind)
    for rows in (2, 64, 14, 1 if cfg == 1 else 6):
        before, after = draw(head, rows, cfg, temperature)
        with patch_diffloss(head):
            assert "sample" in vars(head)
            found, generator = draw(head, rows, cfg, temperature)
        assert error(found, before) < 1e-4 * before.abs().max() and found.dtype == torch.float32
        assert generator == after  # as many random numbers were used up
        assert torch.equal(draw(head, rows, cfg, temperature)[0], before)


@pytest.mark.parametrize("steps", ["2", "10", "25", "64", "100", "250", "20,0"])
@pytest.mark.parametrize("kind", [MarDiffLoss, HartDiffLoss])
def test_schedules_that_start_anywhere_are_recognised(kind, steps):
    """Unclipped, x_0 is 2e4 times what epsilon is off by at t = 999: a careless probe overflows there."""
    said = explain(randomise(kind(**SIZES, num_sampling_steps=steps)))
    assert f"{steps.split(',')[0]} steps from t = {499 if ',' in steps else 999}, guidance" in said


def test_the_published_schedule_of_mar():
    """100 steps from t = 999; with a network that, as a trained one, predicts most of the noise."""
    head = randomise(MarDiffLoss(**SIZES, num_sampling_steps="100"))
    with torch.no_grad():
        head.net.final_layer.linear.weight.mul_(1e-3)
        head.net.final_layer.linear.bias.zero_()
    for cfg in (1.0, 2.5):
        before, after = draw(head, 6, cfg)
        with patch_diffloss(head):
            found, generator = draw(head, 6, cfg)
        assert before.isfinite().all() and error(found, before) < 1e-3 * before.abs().max() and generator == after


@pytest.mark.parametrize("kind", HEADS)
def test_recorded_vectors(kind, monkeypatch):
    recorded, given = vectors(f"head_{kind}"), settings(f"head_{kind}")
    sizes = dict(given["kwargs"])
    head = (MarDiffLoss if kind == "mar" else HartDiffLoss)(**sizes)
    head.load_state_dict(released_state(f"head_{kind}"))
    patch_diffloss(head)
    for case, call in given["cases"].items():
        steps = iter(recorded[f"sample/{case}/noise/steps"])
        monkeypatch.setattr(torch, "randn", lambda *a, case=case, **k: recorded[f"sample/{case}/noise/init"].clone())
        monkeypatch.setattr(torch, "randn_like", lambda *a, steps=steps, **k: next(steps).clone())
        found = head.sample(recorded["condition"], call["temperature"], call["cfg"])
        monkeypatch.undo()
        assert error(found, recorded[f"sample/{case}/out"]) < 1e-4


def test_guidance_may_be_a_tensor_of_one_number():
    head = make()
    before = draw(head)[0]
    patch_diffloss(head)
    assert error(draw(head, cfg=torch.tensor([2.5]), temperature=torch.tensor(1.0))[0], before) < 1e-4


def test_no_rows():
    head = make()
    patch_diffloss(head)
    assert head.sample(condition(0)).shape == (0, CHANNELS)


def test_many_steps_share_a_product_and_few_rows_agree_with_many():
    head = make()
    with patch_diffloss(head, rng="counter"):
        torch.manual_seed(1)
        many = head.sample(condition(600))
        torch.manual_seed(1)
        few = head.sample(condition(600)[:3])
    assert error(many[:3], few) < 1e-4  # a row's noise is its position's


def test_counter_noise_is_random_and_seeded_by_torch():
    head = make("dcar")
    patch_diffloss(head, rng="counter")
    first, again = draw(head)[0], draw(head)[0]
    assert torch.equal(first, again)
    other = head.sample(condition(6), 1.0, 2.5)
    assert not torch.equal(first, other)
    with torch.no_grad():
        head.net.final_layer.linear.weight.zero_(), head.net.final_layer.linear.bias.zero_()
    wide = head.sample(torch.zeros(4096, CONDITION), 1.0, 1.0) / 0.107
    unpatch(head)
    plain = head.sample(torch.zeros(4096, CONDITION), 1.0, 1.0) / 0.107
    assert abs(wide.std() - plain.std()) < 0.02 * plain.std() and abs(wide.mean()) < 0.02


def test_low_precision_is_close_and_asked_for():
    head = make("dcar")
    exact = draw(head)[0]
    with patch_diffloss(head, dtype=torch.bfloat16):
        found = draw(head)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plain = original(head, condition(6), 1.0, 2.5)
        with patch_diffloss(head):
            automatic = draw(head)[0]
    assert torch.equal(found, automatic)
    assert 0 < error(found, exact) <= 2 * error(plain, exact) + 1e-3


# ---- nothing but sample changes


def test_the_module_stays_what_it_was():
    model = Model(make()).train()
    head = model.heads.residual
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch = patch_diffloss(model)
    assert patch.path == "heads.residual" and patch.diffloss is head
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and "sample" not in dict(model.named_modules())
    head(torch.randn(4, CHANNELS), condition(4)).backward()  # training goes on
    assert head.net.input_proj.weight.grad.abs().sum() > 0
    assert MarDiffLoss.sample is type(head).sample and "sample" not in vars(make())


def test_copies_and_pickles_sample_with_their_own_weights():
    head = make()
    patch_diffloss(head, rng="counter")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.sample.diffloss is other and other.sample.rng == "counter"
        assert torch.equal(draw(other)[0], draw(head)[0])
        randomise(other, seed=1)
        assert not torch.equal(draw(other)[0], draw(head)[0])
    assert unpatch(head) and not unpatch(head) and "sample" in vars(other)


def _optimiser(head):
    head(torch.randn(4, CHANNELS), condition(4)).backward()
    torch.optim.SGD(head.parameters(), 0.5).step()


def _data(head):
    head.net.cond_embed.weight.data.mul_(1.5)


def _swapped(head):
    head.net.input_proj.weight = nn.Parameter(head.net.input_proj.weight.detach() * 2)


def _merged(head):
    head.net.res_blocks[1].mlp[0].weight.data = head.net.res_blocks[1].mlp[0].weight.data + 0.1


def _loaded(head):
    head.load_state_dict(make_other().state_dict())


def _scale(head):
    head.vae_scale = 0.5


def _tensor_scale(head):
    head.vae_scale = torch.tensor(0.5)


def _schedule_in_place(head):
    other = Diffusion("5")
    vars(head.gen_diffusion).update(vars(other))


def _steps(head):
    head.gen_diffusion = Diffusion("5")


def _layer(head):
    head.net.res_blocks[0].mlp[2] = randomise(nn.Linear(32, 32), seed=4)


def make_other() -> nn.Module:
    return randomise(KINDS["hart"](), seed=3)


@pytest.mark.parametrize(
    "change", [_optimiser, _data, _swapped, _merged, _loaded, _scale, _tensor_scale, _schedule_in_place, _steps, _layer]
)
def test_changes_of_the_module_are_followed(change):
    head = make("hart")
    patch_diffloss(head)
    before = draw(head)[0]
    change(head)
    found = draw(head)[0]
    assert not torch.equal(found, before)
    assert error(found, original(head, condition(6), 1.0, 2.5)) < 1e-4


def test_a_scale_that_is_a_tensor_is_watched_too():
    head = make("hart")
    head.vae_scale = torch.tensor(0.5)
    patch_diffloss(head)
    before = draw(head)[0]
    head.vae_scale.mul_(2)
    assert error(draw(head)[0], 2 * before) < 1e-4


def test_another_forward_of_a_class_runs_the_original(monkeypatch, caplog):
    head = make()
    patch_diffloss(head)
    draw(head)
    block = type(head.net.res_blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, y: forward(self, x, y) + y)
    found = draw(head)[0]
    assert torch.equal(found, original(head, condition(6), 1.0, 2.5)) and "computes something else" in caplog.text


def test_a_write_that_nobody_notices_and_refresh():
    head = make("hart")
    patch = patch_diffloss(head)
    before = draw(head)[0]
    head.net.cond_embed.weight.data.numpy()[1:31:3] += 0.25
    patch.refresh()
    found = draw(head)[0]
    assert not torch.equal(found, before) and error(found, original(head, condition(6), 1.0, 2.5)) < 1e-4


# ---- patching


def test_unpatching_restores_bit_by_bit():
    head = make()
    before = draw(head)[0]
    patch_diffloss(head)
    draw(head)
    assert unpatch(head)
    assert torch.equal(draw(head)[0], before) and "sample" not in vars(head)


def test_patching_again_replaces_the_patch():
    head = make()
    patch_diffloss(head)
    patch_diffloss(head, rng="counter")
    assert head.sample.rng == "counter"
    unpatch(head)
    assert "sample" not in vars(head)


def test_patched_under_compile():
    head = make()
    before = draw(head)[0]
    patch_diffloss(head)
    torch.manual_seed(5)
    found = torch.compile(lambda z: head.sample(z, 1.0, 2.5) + 0.0, backend="eager")(condition(6))
    assert error(found, before) < 1e-4
    compiled = torch.compile(make(), backend="eager")
    assert patch_diffloss(compiled).diffloss is compiled._orig_mod
    assert error(draw(compiled)[0], before) < 1e-4


def test_what_is_said_about_a_head():
    head = make("dcar")
    said = explain(Model(head))
    assert "heads.residual" in said and "2 blocks x 32, 8 channels, 9 steps from t = 999" in said
    assert "guidance c+s(c-u), x_0 clamped to [-1, 1], result x 0.107" in said and "not patched" in said
    with patch_diffloss(head) as patch:
        assert "sample runs on packed matrix products, cpu, float32" in patch.explain()
    assert "guidance u+s(c-u), x_0 not clamped, result x 1" in explain(make("mar"))
    assert explain(nn.Linear(2, 2)) == (
        "not recognised: Linear holds no diffusion head: no module of it has net, gen_diffusion and sample"
    )


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"rng": "torch"}, "rng must be"), ({"dtype": int}, "dtype must be"), ({"graphs": 1}, "graphs must be")],
)
def test_options_that_do_not_exist(wrong, reason):
    head = make()
    with pytest.raises(ValueError, match=reason):
        patch_diffloss(head, **wrong)
    assert "sample" not in vars(head)


# ---- what is refused


class Adapted(nn.Linear):
    """A linear layer with something added."""

    def forward(self, x):
        return super().forward(x) + 1


class OtherGuidance(MarNet):
    def guided(self, conditional, unconditional, scale):
        return unconditional + (scale - 1) * (conditional - unconditional)


class OtherForward(HartNet):
    def forward(self, x, t, c):
        return super().forward(x, t, -c)


class OtherLoop(Diffusion):
    def p_sample(self, model, x, t, clip_denoised=True, model_kwargs=None, temperature=1.0):
        return super().p_sample(model, x, t, clip_denoised, model_kwargs, temperature**0.5)


class Draws(Diffusion):
    def p_sample(self, *args, **kwargs):
        return super().p_sample(*args, **kwargs) + 0 * torch.randn(1)


class OtherResult(MarDiffLoss):
    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z, temperature, cfg) + 0.5


class OtherLoopName(MarDiffLoss):
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.gen_diffusion.ddim_sample_loop(self.net, z)


class Counts(MarDiffLoss):
    def sample(self, z, temperature=1.0, cfg=1.0):
        self.calls = 1
        return super().sample(z, temperature, cfg)


class Warm(MarDiffLoss):
    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z, temperature * 1.1, cfg)


def _set(path: str, value: object):
    def change(head: nn.Module) -> nn.Module:
        *parents, last = path.split(".")
        owner = head
        for part in parents:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        if last.isdigit():
            owner[int(last)] = value
        else:
            setattr(owner, last, value)
        return head

    return change


def _kind(cls):
    return lambda head: randomise(cls(**SIZES, num_sampling_steps="12,0"))


def _network(cls):
    return lambda head: _set("net", randomise(cls(CHANNELS, 32, CONDITION, 2)))(head)


def _more(head):
    head.net.res_blocks[1].mlp.append(nn.Linear(32, 32))
    return head


REFUSED = {
    "extra layer": (_more, "net.res_blocks.1.mlp has 4 layers, not 3"),
    "extra module": (_set("net.extra", nn.Linear(2, 2)), r"net \(MarNet\) also has extra"),
    "extra parameter": (_set("net.bias", nn.Parameter(torch.zeros(2))), "also has bias"),
    "missing module": (_set("net.cond_embed", None), "lacks cond_embed"),
    "adapted": (_set("net.res_blocks.0.mlp.0", Adapted(32, 32)), "net.res_blocks.0.mlp.0 is a Adapted"),
    "other activation": (_set("net.res_blocks.0.mlp.1", nn.GELU()), "is a GELU, not PyTorch's SiLU"),
    "other norm": (_set("net.res_blocks.0.in_ln", nn.LayerNorm(32)), "eps 1e-05"),
    "no bias": (_set("net.input_proj", nn.Linear(CHANNELS, 32, bias=False)), "net.input_proj has no bias"),
    "no blocks": (_set("net.res_blocks", nn.ModuleList()), "net.res_blocks is empty"),
    "sizes": (_set("net.final_layer.linear", nn.Linear(32, CHANNELS)), "maps 32 to 8 features, not 32 to 16"),
    "guidance": (_network(OtherGuidance), "guides epsilon neither by"),
    "forward": (_network(OtherForward), "net.forward computes something else"),
    "temperature": (_set("gen_diffusion", OtherLoop("12,0")), r"p_sample_loop at t = \d+ computes something else"),
    "more noise": (_set("gen_diffusion", Draws("12,0")), "not one randn_like of all rows"),
    "no diffusion": (_set("gen_diffusion", object()), "gen_diffusion.model_mean_type is None"),
    "result": (_kind(OtherResult), "something else than p_sample_loop's result times a constant"),
    "loop": (_kind(OtherLoopName), "gen_diffusion.ddim_sample_loop"),
    "sets": (_kind(Counts), "sample sets calls"),
    "own temperature": (_kind(Warm), "gives p_sample_loop temperature"),
    "taken": (_set("sample", lambda z: z), "was already replaced on this instance"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_recognised_is_refused_with_the_reason(what):
    change, reason = REFUSED[what]
    head = change(make())
    before = dict(vars(head))
    state = torch.get_rng_state()
    with pytest.raises(Unrecognised, match=reason):
        patch_diffloss(head)
    assert dict(vars(head)) == before and torch.equal(torch.get_rng_state(), state)
    assert "not recognised" in explain(head)


@pytest.mark.parametrize(
    ("name", "kind"), [("model_mean_type", MeanType.START_X), ("model_var_type", VarType.FIXED_LARGE)]
)
def test_other_kinds_of_diffusion_are_refused(name, kind):
    head = make()
    setattr(head.gen_diffusion, name, kind)
    with pytest.raises(Unrecognised, match=f"{name} is {kind.name}"):
        patch_diffloss(head)


def test_none_and_several_heads_are_refused():
    with pytest.raises(ValueError, match="Linear holds no diffusion head"):
        patch_diffloss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"holds 2 diffusion heads \(0, 1\): patch them one by one"):
        patch_diffloss(nn.Sequential(make(), make()))


def test_an_object_that_is_no_module_may_hold_the_head():
    class Pipeline:
        pass

    pipeline = Pipeline()
    pipeline.model = Model(make())
    assert patch_diffloss(pipeline).path == "model.heads.residual"


# ---- what the original has to do


def _hooked(head):
    head.net.res_blocks[0].mlp[0].register_forward_hook(lambda module, given, out: out * 2)


def _wrapped(head):
    head.net.cond_embed = nn.utils.parametrizations.weight_norm(head.net.cond_embed)


def _quantised(head):
    head.net.input_proj = Adapted(CHANNELS, 32)


@pytest.mark.parametrize("change", [_hooked, _wrapped, _quantised])
def test_what_cannot_be_served_later_runs_the_original_and_says_so_once(change, caplog):
    head = make()
    patch_diffloss(head)
    draw(head)
    change(head)
    with caplog.at_level(logging.WARNING, "dcar_fast"):
        found = [draw(head)[0] for _ in range(2)]
    assert all(torch.equal(one, original(head, condition(6), 1.0, 2.5)) for one in found)
    assert len(caplog.records) == 1 and "MarDiffLoss.sample runs the original" in caplog.text


def test_gradients_run_the_original(caplog):
    head = make()
    patch_diffloss(head)
    z = condition(6).requires_grad_()
    torch.manual_seed(5)
    found = head.sample(z, 1.0, 2.5)
    assert torch.equal(found, original(head, z, 1.0, 2.5)) and "gradients are asked for" in caplog.text
    with torch.no_grad():
        assert error(draw(head)[0], found) < 1e-4
    caplog.clear()
    assert not draw(head)[0].requires_grad and not caplog.records  # their loop switches gradients off


def test_arguments_of_other_samplers_run_the_original():
    head = make("hart")
    patch_diffloss(head)
    torch.manual_seed(5)
    assert error(head.sample(condition(2), sampler="iddpm"), original(head, condition(2))) < 1e-4
    with pytest.raises(NotImplementedError):
        head.sample(condition(2), sampler="ddim")
    head.sampler = "dpm"
    with pytest.raises(NotImplementedError):
        head.sample(condition(2))


@pytest.mark.parametrize("call", [((), {}), ((condition(3), 1.0, 2.5), {}), ((condition(4)[:, :5],), {})])
def test_errors_are_the_originals(call):
    args, kwargs = call
    head = make()
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever it is
        type(head).sample(head, *args, **kwargs)
    patch_diffloss(head)
    with pytest.raises(type(theirs.value)) as ours:
        head.sample(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)
