"""The diffusion head in its three dialects, its schedule, and one denoising step."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast.models.diffusion_head import HART, MAR, Dialect, DiffusionHead, sample_rows, timestep_embedding
from dcar_fast.reference.denoise_step import guide, posterior_step
from dcar_fast.reference.diffusion import diffusion_schedule, kept_timesteps
from tests.golden_vectors import HEADS, error, head, settings, vectors

DIALECTS = {"mar": MAR, "hart": HART, "dcar": Dialect(scale=0.107)}
CASES = [(name, case) for name in HEADS for case in settings(f"head_{name}")["cases"]]
KEPT_32 = [
    0,
    32,
    64,
    97,
    129,
    161,
    193,
    226,
    258,
    290,
    322,
    354,
    387,
    419,
    451,
    483,
    516,
    548,
    580,
    612,
    645,
    677,
]
KEPT_32 += [709, 741, 773, 806, 838, 870, 902, 935, 967, 999]


@pytest.mark.parametrize("name", HEADS)
def test_recorded_network(name):
    recorded = vectors(f"head_{name}")
    with torch.no_grad():
        out = head(name)(recorded["net/x"], recorded["net/t"], recorded["condition"])
    assert error(out, recorded["net/out"]) < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_dialects_are_the_recorded_ones(name):
    recorded = settings(f"head_{name}")
    assert DIALECTS[name].guidance == recorded["guided"].replace(" ", "")
    assert (DIALECTS[name].clip, DIALECTS[name].scale) == (recorded["clip_denoised"], recorded["scale"])
    assert list(kept_timesteps(recorded["kwargs"]["num_sampling_steps"])) == recorded["timestep_map"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_recorded_sampling(name, case):
    recorded, case_settings = vectors(f"head_{name}"), settings(f"head_{name}")["cases"][case]
    steps, asked = recorded[f"sample/{case}/noise/steps"], []

    def latent(i: int) -> torch.Tensor:
        asked.append(i)
        return steps[i]

    out = sample_rows(
        head(name),
        recorded["condition"],
        diffusion_schedule(settings(f"head_{name}")["kwargs"]["num_sampling_steps"]),
        recorded[f"sample/{case}/noise/init"],
        latent,
        guidance=case_settings["cfg"],
        temperature=case_settings["temperature"],
        dialect=DIALECTS[name],
    )
    assert out.dtype == torch.float32
    assert error(out, recorded[f"sample/{case}/out"]) < 1e-4
    assert asked == list(range(10))


@pytest.mark.parametrize("name", HEADS)
def test_the_conditional_half_can_be_carried_alone(name):
    """With noise for half the rows only that half comes back, with the same values."""
    recorded = vectors(f"head_{name}")
    case = next(c for c, values in settings(f"head_{name}")["cases"].items() if values["cfg"] != 1.0)
    values, steps = settings(f"head_{name}")["cases"][case], recorded[f"sample/{case}/noise/steps"]
    seen = []
    out = sample_rows(
        head(name),
        recorded["condition"],
        diffusion_schedule(settings(f"head_{name}")["kwargs"]["num_sampling_steps"]),
        recorded[f"sample/{case}/noise/init"],
        lambda i: steps[i, :5],
        guidance=values["cfg"],
        temperature=values["temperature"],
        dialect=DIALECTS[name],
        progress=seen.append,
    )
    assert error(out, recorded[f"sample/{case}/out"][:5]) < 1e-4
    assert seen == list(range(10))


def test_unguided_rows_are_independent():
    recorded, schedule = vectors("head_dcar"), diffusion_schedule(7)
    torch.manual_seed(0)
    start, noise = torch.randn(10, 8), torch.randn(7, 10, 8)
    together = sample_rows(head("dcar"), recorded["condition"], schedule, start, lambda i: noise[i])
    for row in (0, 3, 9):
        one = slice(row, row + 1)
        condition = recorded["condition"][one]
        alone = sample_rows(head("dcar"), condition, schedule, start[one], lambda i, one=one: noise[i, one])
        assert error(alone, together[one]) < 1e-4


def test_bad_rows():
    schedule, condition = diffusion_schedule(3), vectors("head_dcar")["condition"]

    def run(condition, start, latent, **options):
        return sample_rows(head("dcar"), condition, schedule, start, latent, **options)

    with pytest.raises(ValueError, match="condition.*even.*9"):
        run(condition[:9], torch.zeros(4, 8), lambda i: torch.zeros(4, 8), guidance=2.0)
    with pytest.raises(ValueError, match=r"latent_init.*\(5, 8\).*\(10, 8\)"):
        run(condition, torch.zeros(10, 8), lambda i: torch.zeros(5, 8), guidance=2.0)
    with pytest.raises(ValueError, match=r"latent\(0\).*10 or 5.*\(4, 8\)"):
        run(condition, torch.zeros(5, 8), lambda i: torch.zeros(4, 8), guidance=2.0)
    with pytest.raises(ValueError, match=r"latent\(1\)"):  # once all rows were carried, half of them do not do
        run(condition, torch.zeros(5, 8), lambda i: torch.zeros(10 if i == 0 else 5, 8), guidance=2.0)
    with pytest.raises(ValueError, match="formula.*'c-u'"):
        run(condition, torch.zeros(5, 8), lambda i: torch.zeros(5, 8), guidance=2.0, dialect=Dialect("c-u"))
    assert run(condition[:0], torch.zeros(0, 8), lambda i: torch.zeros(0, 8)).shape == (0, 8)


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0, 1, 500, 999]))
    assert embedding.shape == (4, 256)
    for row, t in enumerate((0, 1, 500, 999)):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert embedding[row, i].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert embedding[row, 128 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_head_is_the_formula():
    """Every block written out in float64, with random modulations."""
    torch.manual_seed(3)
    model = DiffusionHead(3, 5, 16, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.double()
    x, t, condition = torch.randn(4, 3).double(), torch.tensor([0, 3, 77, 999]), torch.randn(4, 5).double()
    p = model.state_dict()

    def linear(name, v):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def silu(v):
        return v / (1 + torch.exp(-v))

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / torch.sqrt(v.var(-1, unbiased=False, keepdim=True) + 1e-6)

    y = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", timestep_embedding(t).double())))
    y = y + linear("cond_embed", condition)
    h = linear("input_proj", x)
    for i in range(2):
        name = f"res_blocks.{i}"
        modulation = linear(f"{name}.adaLN_modulation.1", silu(y))
        shift, scale, gate = modulation[:, :16], modulation[:, 16:32], modulation[:, 32:]
        inner = norm(h) * p[f"{name}.in_ln.weight"] + p[f"{name}.in_ln.bias"]
        h = h + gate * linear(f"{name}.mlp.2", silu(linear(f"{name}.mlp.0", inner * (1 + scale) + shift)))
    modulation = linear("final_layer.adaLN_modulation.1", silu(y))
    out = linear("final_layer.linear", norm(h) * (1 + modulation[:, 16:]) + modulation[:, :16])
    assert error(model(x, t, condition), out) < 1e-9


# The schedule, from its definition, in Python floats


def alpha_bars() -> list[float]:
    def curve(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    product, out = 1.0, []
    for i in range(1000):
        product *= 1 - min(1 - curve((i + 1) / 1000) / curve(i / 1000), 0.999)
        out.append(product)
    return out


def test_kept_timesteps():
    assert list(kept_timesteps(32)) == KEPT_32
    assert kept_timesteps(21)[10] == 499, "a running sum, not round(i * 999 / 20)"
    assert kept_timesteps(1) == (0,) and kept_timesteps(2) == (0, 999)
    assert kept_timesteps(1000) == tuple(range(1000)) == kept_timesteps("1000")
    assert kept_timesteps("10,0") == (0, 55, 111, 166, 222, 277, 333, 388, 444, 499)
    assert kept_timesteps("0,3") == (500, 750, 999)  # 249.5 rounds half to even: 250
    assert kept_timesteps("1,1,2") == (0, 334, 667, 999)  # sections of 334, 333, 333
    for steps in range(1, 1001, 37):
        position, expected = 0.0, []
        for _ in range(steps):
            expected.append(round(position))
            position += 999 / (steps - 1) if steps > 1 else 1
        assert list(kept_timesteps(steps)) == expected


@pytest.mark.parametrize("spec", [0, -1, 1001, "0", "600,600", "501,0"])
def test_kept_timesteps_refuses(spec):
    with pytest.raises(ValueError, match="head_steps"):
        kept_timesteps(spec)


@pytest.mark.parametrize("spec", [1000, 32, 21, 2, "10,0", "7,3"])
def test_schedule_from_its_definition(spec):
    schedule, kept, bars = diffusion_schedule(spec), kept_timesteps(spec), alpha_bars()
    assert schedule.timesteps == kept and schedule.num_steps == len(kept)
    previous = 1.0
    variances = []
    for k, t in enumerate(kept):
        bar = bars[t]
        beta = 1 - bar / previous
        variances.append(beta * (1 - previous) / (1 - bar))
        expected = {
            "alpha_bar": bar,
            "x0_from_x": 1 / math.sqrt(bar),
            "x0_from_epsilon": math.sqrt(1 / bar - 1),
            "mean_from_x0": beta * math.sqrt(previous) / (1 - bar),
            "mean_from_x": (1 - previous) * math.sqrt(1 - beta) / (1 - bar),
            "log_beta": math.log(beta),
        }
        for name, value in expected.items():
            found = getattr(schedule, name)
            assert found.dtype.name == "float64"
            assert found[k] == pytest.approx(value, rel=1e-7, abs=1e-12), (name, k)
        previous = bar
    variances[0] = variances[1]
    assert schedule.posterior_log_variance.tolist() == pytest.approx([math.log(v) for v in variances], rel=1e-7)


def test_one_step_schedule():
    schedule = diffusion_schedule(1)
    assert schedule.timesteps == (0,)
    epsilon, x = torch.full((2, 3), 0.25), torch.full((2, 3), 0.5)
    bar = alpha_bars()[0]
    expected = 0.5 / math.sqrt(bar) - math.sqrt(1 / bar - 1) * 0.25  # the mean is the predicted x_0
    out = posterior_step(x, epsilon, torch.zeros(2, 3), torch.full((2, 3), math.nan), schedule, 0, clip=False)
    assert error(out, torch.full((2, 3), expected)) < 1e-6


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("k", [0, 1, 15, 31])
@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_denoise_step_in_python_floats(clip, k, temperature):
    torch.manual_seed(k)
    x, epsilon, variance, noise = (torch.randn(4, 3, dtype=torch.float64) for _ in range(4))
    out = posterior_step(x, epsilon, variance, noise, diffusion_schedule(32), k, temperature=temperature, clip=clip)
    bars = alpha_bars()
    now, before = bars[KEPT_32[k]], bars[KEPT_32[k - 1]] if k else 1.0
    beta = 1 - now / before

    def posterior(step: int) -> float:
        a, b = bars[KEPT_32[step]], bars[KEPT_32[step - 1]]
        return (1 - a / b) * (1 - b) / (1 - a)

    for i in range(4):
        for j in range(3):
            values = (t[i, j].item() for t in (x, epsilon, variance, noise))
            x_t, eps, v, z = values
            x0 = (x_t - math.sqrt(1 - now) * eps) / math.sqrt(now)
            if clip:
                x0 = min(1.0, max(-1.0, x0))
            mean = beta * math.sqrt(before) / (1 - now) * x0 + (1 - before) * math.sqrt(1 - beta) / (1 - now) * x_t
            f = (v + 1) / 2
            log_variance = f * math.log(beta) + (1 - f) * math.log(posterior(max(k, 1)))
            expected = mean + (temperature * math.exp(log_variance / 2) * z if k else 0.0)
            assert out[i, j].item() == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_no_noise_in_the_last_step_even_if_it_is_nan():
    x = torch.randn(2, 3)
    nan = torch.full((2, 3), math.nan)
    assert posterior_step(x, x, x, nan, diffusion_schedule(32), 0).isfinite().all()


def test_guidance_formulas():
    c, u = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 4.0])
    assert guide(c, u, 4.5, "c+s(c-u)").tolist() == [5.5 * 3 - 4.5, -5.5 - 18.0]
    assert guide(c, u, 2.5, "u+s(c-u)").tolist() == [6.0, 4.0 - 12.5]
    with pytest.raises(ValueError, match="formula"):
        guide(c, u, 1.0, "c")


def test_low_precision_head_stays_close():
    recorded, schedule = vectors("head_dcar"), diffusion_schedule(10)
    low = DiffusionHead(8, 24, 32, 2)
    low.load_state_dict(head("dcar").state_dict())
    low = low.bfloat16()
    noise = recorded["sample/cfg4.5-temp1.0/noise/steps"]
    start = recorded["sample/cfg4.5-temp1.0/noise/init"]
    args = (schedule, start, lambda i: noise[i])
    out = sample_rows(low, recorded["condition"].bfloat16(), *args, guidance=4.5, dialect=Dialect())
    assert out.dtype == torch.float32, "the denoising itself stays in float32"
    exact = sample_rows(head("dcar"), recorded["condition"], *args, guidance=4.5, dialect=Dialect())
    assert (out - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()
