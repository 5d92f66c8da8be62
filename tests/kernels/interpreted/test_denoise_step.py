"""kernels/denoise_step.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dcar_fast.kernels import _denoise_parts as parts
from dcar_fast.kernels import denoise_step as kernels
from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.noise import LatentNoise
from dcar_fast.ops import embed_condition, embed_timesteps, modulations, pack_head, step_coefficients
from dcar_fast.reference.denoise_step import HeadWeights
from dcar_fast.reference.denoise_step import denoise_step as reference
from dcar_fast.reference.diffusion import diffusion_schedule
from tests.golden_vectors import error, head, settings, vectors
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MODES = ["unguided", "guided", "both halves"]


def random_weights(channels: int, width: int, depth: int, dtype: torch.dtype = torch.float32) -> HeadWeights:
    torch.manual_seed(width + depth)
    model = DiffusionHead(channels, 7, width, depth)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, mean=2.0 if name == "input_proj.bias" else 0.0, std=spread)
    return pack_head(model, dtype)


class Case:
    """The arguments of one step, and what is right for them."""

    def __init__(self, weights: HeadWeights, rows: int, mode: str = "guided", k: int = 5) -> None:
        schedule, generator = diffusion_schedule(10), torch.Generator().manual_seed(rows)
        carried = rows // 2 if mode == "guided" else rows
        self.weights, self.rows = weights, rows
        self.x = torch.randn(carried, weights.channels, generator=generator)
        self.noise = torch.randn(carried, weights.channels, generator=generator)
        self.coefficients = step_coefficients(schedule, "cpu")[k]
        condition = embed_condition(weights, torch.randn(rows, 7, generator=generator))
        self.modulation = modulations(weights, condition, embed_timesteps(weights, schedule.timesteps)[k])
        self.formula = "u+s(c-u)" if mode == "both halves" else "c+s(c-u)"
        self.settings = {
            "guidance": 1.0 if mode == "unguided" else 2.5,
            "temperature": 0.9,
            "clip": mode != "both halves",
        }

    def run(self, **changes) -> Tensor:
        inputs = {name: getattr(self, name) for name in ("x", "modulation", "weights", "coefficients", "noise")}
        return kernels.denoise_step(
            **{**inputs, **self.settings, **changes}, from_conditional=self.formula == "c+s(c-u)"
        )

    def check(self, got: Tensor) -> None:
        plain = reference(
            self.x, self.modulation, self.weights, self.coefficients, self.noise, formula=self.formula, **self.settings
        )
        wide = HeadWeights(*(weight.double() for weight in self.weights))
        truth = reference(
            self.x.double(),
            self.modulation.double(),
            wide,
            self.coefficients,
            self.noise.double(),
            formula=self.formula,
            **self.settings,
        )
        check_close(got, plain, truth)


# around tiles of 16, 32 and 64 rows, channels and columns
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 2),
        (4, 48, 1, 6),
        (32, 64, 2, 34),
        (16, 100, 3, 66),
        (65, 130, 1, 10),
        (64, 65, 9, 2),
        (3, 260, 1, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_float64_agrees(shape: tuple[int, int, int, int], dtype: torch.dtype, mode: str) -> None:
    channels, width, depth, rows = shape
    case = Case(random_weights(channels, width, depth, dtype), rows, mode)
    case.check(case.run())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "unguided"])
def test_guidance_may_be_a_tensor(mode: str) -> None:
    case = Case(random_weights(4, 48, 2), 6, mode)
    case.check(case.run(guidance=torch.tensor(case.settings["guidance"])))


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the rules for few of them serve, which normalise before the product and not in it."""
    launched = []
    modulate = parts.modulate
    monkeypatch.setattr(parts, "modulate", lambda *args: launched.append(len(args[0])) or modulate(*args))
    case = Case(random_weights(4, 30, 2), 1026)
    case.check(case.run())
    assert launched == [513, 1026], "the first block reads what both halves share"
    launched.clear()
    Case(random_weights(4, 30, 1), 70).run()
    assert not launched


def with_configuration(monkeypatch: pytest.MonkeyPatch, part: str, config: parts.Config) -> None:
    monkeypatch.setattr(parts, part.upper(), SimpleNamespace(pick=lambda device, **sizes: config))


def candidates() -> list[tuple[str, parts.Config]]:
    """Every tile size once: the interpreter knows neither warps nor stages."""
    tiles = {
        (part, str(config.blocks)): config for part, table in kernels.TABLES.items() for config in table.candidates
    }
    return [(part, config) for (part, _), config in tiles.items()]


@pytest.mark.parametrize(("part", "config"), candidates(), ids=str)
def test_every_configuration_gives_the_same(monkeypatch, part: str, config: parts.Config) -> None:
    case = Case(random_weights(5, 40, 1), 36)
    if part == "modulate":
        with_configuration(monkeypatch, "hidden", parts.hidden_linear(0, 32, 32, 32, 4, 2))
    with_configuration(monkeypatch, part, config)
    case.check(case.run())


def test_shipped_configurations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(random_weights(5, 72, 1), 40)
    for part, table in kernels.TABLES.items():
        for config in {str(rule.config): rule.config for rule in table.shipped["datacenter"]}.values():
            with monkeypatch.context() as patch:
                with_configuration(patch, part, config)
                case.check(case.run())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 6, 66])  # 66: two tiles
def test_counter_noise_is_the_tensor_of_it(mode: str, channels: int) -> None:
    case = Case(random_weights(channels, 20, 1), 38, mode)
    rows = len(case.x)
    seeds = torch.tensor([0, 1, 2**32 + 5, 2**63 - 1]).repeat(rows)[:rows]
    drawn = LatentNoise(seeds, torch.arange(rows) * 977 % 1024, 31)
    got = case.run(noise=parts.Counter(drawn.seeds, drawn.tokens, 31))
    assert error(got, case.run(noise=drawn.normal(channels).contiguous())) < 2e-6
    case.noise = drawn.normal(channels)
    case.check(got)


@pytest.mark.parametrize("mode", MODES)
def test_last_step_ignores_the_noise(mode: str) -> None:
    case = Case(random_weights(4, 20, 1), 6, mode, k=0)
    got = case.run()
    case.check(got)
    assert torch.equal(case.run(noise=torch.full_like(case.noise, float("nan"))), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_see_each_other(mode: str, dtype: torch.dtype) -> None:
    case = Case(random_weights(4, 40, 2, dtype), 70, mode)
    want = case.run()
    case.x[0], case.x[3], case.x[7] = float("nan"), float("inf"), 1e6
    got = case.run()
    rows = {row + start for row in (0, 3, 7) for start in ((0, 35) if mode == "both halves" else (0,))}
    others = torch.tensor([row for row in range(len(case.x)) if row not in rows])
    assert torch.equal(got[others], want[others])
    assert got[[0, 3]].isnan().all()


def test_tuned_launches_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tuner compares: the same finite tensors from every configuration, on inputs of a smaller head."""
    for name, value in (("WIDTH", 48), ("DEPTH", 1), ("CHANNELS", 5)):
        monkeypatch.setattr(kernels, name, value)
    torch.manual_seed(0)
    launches = kernels.launches(torch.device("cpu"), 10, torch.float32)
    assert set(launches) == set(kernels.TABLES) == {case.label.split()[0] for case in kernels.cases()}
    for part, launch in launches.items():
        want = launch(None)
        assert want.isfinite().all() and want.std() > 0.01, part
        for config in kernels.TABLES[part].candidates[:: len(kernels.TABLES[part].candidates) - 1]:
            assert error(launch(config), want) < 1e-4, part


def test_moments_survive_a_large_mean() -> None:
    """A stream whose mean is 1000 times its spread: sums of squares would lose all of the variance."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 3), torch.randn(150, 3), torch.full((150,), 4000.0)
    h, moments = parts.project(x, weight, bias)
    norm = torch.ones(150), torch.zeros(150)
    got = parts.modulate(h, moments, norm, torch.zeros(9, 300), 0)
    plain = nn.functional.layer_norm(h, (150,), eps=1e-6)
    check_close(got, plain, nn.functional.layer_norm(h.double(), (150,), eps=1e-6))


def test_strided_modulations_and_no_rows() -> None:
    case = Case(random_weights(4, 20, 2), 6)
    want = case.run()
    apart = torch.cat([case.modulation, torch.full_like(case.modulation, float("nan"))], dim=1)
    assert torch.equal(case.run(modulation=apart[:, : case.modulation.shape[1]]), want)
    none = case.run(x=case.x[:0], modulation=case.modulation[:0], noise=case.noise[:0])
    assert (none.shape, none.dtype) == ((0, 4), torch.float32)


@pytest.mark.parametrize(("name", "carried"), [("dcar", 5), ("hart", 10), ("mar", 10)])
def test_recorded_heads(name: str, carried: int) -> None:
    recorded, sizes = vectors(f"head_{name}"), settings(f"head_{name}")
    case = next(c for c, values in sizes["cases"].items() if values["cfg"] != 1.0)
    values, schedule = sizes["cases"][case], diffusion_schedule(sizes["kwargs"]["num_sampling_steps"])
    weights = pack_head(head(name))
    steps, times = step_coefficients(schedule, "cpu"), embed_timesteps(weights, schedule.timesteps)
    condition, x = embed_condition(weights, recorded["condition"]), recorded[f"sample/{case}/noise/init"]
    x = x.repeat(carried // len(x), 1)
    for i, k in enumerate(reversed(range(schedule.num_steps))):
        noise = recorded[f"sample/{case}/noise/steps"][i, :carried].contiguous()
        modulation = modulations(weights, condition, times[k])
        options = {"guidance": values["cfg"], "temperature": values["temperature"], "clip": sizes["clip_denoised"]}
        x = kernels.denoise_step(x, modulation, weights, steps[k], noise, from_conditional=name != "mar", **options)
    assert error(x * sizes["scale"], recorded[f"sample/{case}/out"][:carried]) < 1e-4
