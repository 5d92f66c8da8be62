"""denoise_step against the modules' sampler, the recorded heads and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcar_fast.models.diffusion_head import HART, MAR, Dialect, DiffusionHead, sample_rows
from dcar_fast.noise import CounterNoise, LatentNoise
from dcar_fast.ops import (
    denoise_step,
    embed_condition,
    embed_timesteps,
    modulations,
    pack_head,
    step_coefficients,
)
from dcar_fast.reference.denoise_step import Coefficients, HeadWeights, coefficients, posterior_step
from dcar_fast.reference.denoise_step import denoise_step as reference
from dcar_fast.reference.diffusion import diffusion_schedule
from tests.golden_vectors import HEADS, error, head, settings, vectors
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["triton", None]
DIALECTS = {"mar": MAR, "hart": HART, "dcar": Dialect(scale=0.107)}
CASES = [(name, case) for name in HEADS for case in settings(f"head_{name}")["cases"]]
# (channels, width, depth, rows of the network): around tiles of 16, 32 and 64
SHAPES = [(1, 1, 1, 2), (4, 48, 1, 6), (32, 64, 2, 34), (16, 100, 3, 66), (65, 130, 12, 10), (3, 1000, 1, 4)]
LARGE = [(32, 1024, 6, 512), (16, 1280, 8, 70), (32, 256, 1, 4098), (3, 16, 1, 65538)]
MODES = ["unguided", "guided", "both halves"]


def random_head(channels: int, width: int, depth: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A head of which no part is the identity, as it is at creation; its stream has a mean that is no small one."""
    torch.manual_seed(width + depth)
    model = DiffusionHead(channels, 7, width, depth)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, mean=2.0 if name == "input_proj.bias" else 0.0, std=spread)
    return model.to(dtype)


class Case:
    """The arguments of one step, and what is right for them."""

    def __init__(self, shape: tuple[int, int, int, int], mode: str, dtype: torch.dtype, k: int = 5) -> None:
        channels, width, depth, rows = shape
        self.weights = pack_head(random_head(channels, width, depth), dtype)
        schedule = diffusion_schedule(10)
        generator = torch.Generator().manual_seed(rows)
        carried = rows // 2 if mode == "guided" else rows
        self.x = torch.randn(carried, channels, generator=generator)
        self.noise = torch.randn(carried, channels, generator=generator)
        self.coefficients = step_coefficients(schedule, "cpu")[k]
        time = embed_timesteps(self.weights, schedule.timesteps)[k]
        condition = embed_condition(self.weights, torch.randn(rows, 7, generator=generator))
        self.modulation = modulations(self.weights, condition, time)
        self.settings = {
            "guidance": 1.0 if mode == "unguided" else 2.5,
            "temperature": 0.9,
            "formula": "u+s(c-u)" if mode == "both halves" else "c+s(c-u)",
            "clip": mode != "both halves",
        }

    def run(self, device: str = "cpu", backend: str | None = None, **changes) -> Tensor:
        def there(value):
            return value.to(device) if isinstance(value, Tensor) else value

        values = {"x": self.x, "modulation": self.modulation, "coefficients": self.coefficients, "noise": self.noise}
        values = {name: there(value) for name, value in {**values, **changes}.items()}
        weights = HeadWeights(*(weight.to(device) for weight in self.weights))
        order = (values[name] for name in ("x", "modulation"))
        return denoise_step(
            *order, weights, values["coefficients"], values["noise"], **self.settings, backend=backend
        ).cpu()

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The plain op at the case's own precision (float32), or all of it in float64."""
        if dtype == torch.float32:
            return reference(self.x, self.modulation, self.weights, self.coefficients, self.noise, **self.settings)
        wide = HeadWeights(*(weight.double() for weight in self.weights))
        inputs = (self.x.double(), self.modulation.double(), wide, self.coefficients, self.noise.double())
        return reference(*inputs, **self.settings)

    def check(self, got: Tensor) -> None:
        check_close(got, self.reference(torch.float32), self.reference(torch.float64), str(self.settings))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 9])
@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_module(shape: tuple[int, int, int, int], k: int, mode: str) -> None:
    """In float64: the network as its own modules run it, each half's step by itself."""
    channels, width, depth, rows = shape
    model, schedule = random_head(channels, width, depth, torch.float64), diffusion_schedule(10)
    x, noise = torch.randn(2, rows, channels, dtype=torch.float64)
    condition, half = torch.randn(rows, 7, dtype=torch.float64), rows // 2
    weights = pack_head(model)
    time = embed_timesteps(weights, schedule.timesteps)[k]
    modulation = modulations(weights, embed_condition(weights, condition), time)
    step = torch.tensor(coefficients(schedule, k), dtype=torch.float64)
    options = {"temperature": 0.7, "clip": k != 1}
    fed = x if mode == "unguided" else torch.cat((x[:half], x[:half]))
    with torch.no_grad():
        out = model(fed, torch.full((rows,), schedule.timesteps[k]), condition)
    epsilon, variance = out[:, :channels], out[:, channels:]
    if mode != "unguided":
        epsilon = torch.cat([3.5 * epsilon[:half] - 2.5 * epsilon[half:]] * 2)
    want = posterior_step(x, epsilon, variance, noise, schedule, k, **options)
    carried = half if mode == "guided" else rows
    options |= {"guidance": 1.0 if mode == "unguided" else 2.5, "formula": "c+s(c-u)"}
    got = reference(x[:carried], modulation, weights, step, noise[:carried], **options)
    assert error(got, want[:carried]) <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_float64_agrees(dtype: torch.dtype, shape: tuple[int, int, int, int], mode: str) -> None:
    case = Case(shape, mode, dtype)
    case.check(case.run())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (32, 1024, 6, 512), (16, 1280, 8, 70), (32, 256, 1, 4098), (3, 16, 1, 65538)]
)
@pytest.mark.parametrize("mode", MODES)
def test_float64_agrees_on_a_gpu(
    backend: str | None, dtype: torch.dtype, shape: tuple[int, int, int, int], mode: str
) -> None:
    case = Case(shape, mode, dtype)
    case.check(case.run("cuda", backend))


@pytest.mark.gpu
def test_a_graph_replays_all_steps() -> None:
    """32 steps in one CUDA graph: the same values as step by step, from inputs that are written before the replay."""
    weights, schedule = pack_head(random_head(32, 128, 2).cuda()), diffusion_schedule(32)
    steps, times = step_coefficients(schedule, "cuda"), embed_timesteps(weights, schedule.timesteps)
    condition = embed_condition(weights, torch.randn(40, 7, device="cuda"))
    seeds, tokens = torch.zeros(20, dtype=torch.int64, device="cuda"), torch.arange(20, device="cuda")
    start = torch.zeros(20, 32, device="cuda")

    def sample() -> Tensor:
        x = start
        for i, k in enumerate(reversed(range(32))):
            x = denoise_step(
                x,
                modulations(weights, condition, times[k]),
                weights,
                steps[k],
                LatentNoise(seeds, tokens, i),
                guidance=4.5,
                temperature=1.0,
                formula="c+s(c-u)",
                clip=True,
                backend="triton",
            )
        return x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = sample()
    start.normal_()
    seeds.fill_(2**63 - 1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, sample())


def sample(name: str, case: str, rows: int, device: str = "cpu", backend: str | None = None) -> Tensor:
    """All steps of a recorded head; x holds ``rows`` rows."""
    recorded, values = vectors(f"head_{name}"), settings(f"head_{name}")["cases"][case]
    schedule = diffusion_schedule(settings(f"head_{name}")["kwargs"]["num_sampling_steps"])
    weights = HeadWeights(*(weight.to(device) for weight in pack_head(head(name))))
    steps, times = step_coefficients(schedule, device), embed_timesteps(weights, schedule.timesteps)
    condition = embed_condition(weights, recorded["condition"].to(device))
    start = recorded[f"sample/{case}/noise/init"].to(device)
    x = start.repeat(rows // len(start), 1)
    for i, k in enumerate(reversed(range(schedule.num_steps))):
        x = denoise_step(
            x,
            modulations(weights, condition, times[k]),
            weights,
            steps[k],
            recorded[f"sample/{case}/noise/steps"][i, :rows].to(device),
            guidance=values["cfg"],
            temperature=values["temperature"],
            formula=DIALECTS[name].guidance,
            clip=DIALECTS[name].clip,
            backend=backend,
        )
    return (x * DIALECTS[name].scale).cpu()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_recorded_heads(name: str, case: str, backend: str | None) -> None:
    assert error(sample(name, case, 10, backend=backend), vectors(f"head_{name}")[f"sample/{case}/out"]) < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_recorded_conditional_half_alone(name: str) -> None:
    case = next(c for c, values in settings(f"head_{name}")["cases"].items() if values["cfg"] != 1.0)
    assert error(sample(name, case, 5), vectors(f"head_{name}")[f"sample/{case}/out"][:5]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), CASES)
def test_recorded_heads_on_a_gpu(name: str, case: str) -> None:
    got = sample(name, case, 10, "cuda", "triton")
    assert error(got, vectors(f"head_{name}")[f"sample/{case}/out"]) < 1e-4


@pytest.mark.parametrize("dialect", [MAR, HART, Dialect(scale=0.107)], ids=["mar", "hart", "dcar"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_steps_are_the_modules_sampler(dialect: Dialect, guidance: float) -> None:
    """100 steps and a large guidance, with counter noise: what the op draws is what the sampler was given."""
    model, schedule, seeds = random_head(5, 24, 3), diffusion_schedule(100), [3, 2**63 - 1]
    noise = CounterNoise(seeds, num_tokens=4, codebook_size=1, latent_channels=5)
    hidden = torch.randn(8 if guidance == 1.0 else 16, 7, generator=torch.Generator().manual_seed(0))
    options = {"guidance": guidance, "temperature": 0.8}
    start = noise.latent_init().flatten(0, 1)
    want = sample_rows(
        model, hidden, schedule, start, lambda i: noise.latent(i).flatten(0, 1), dialect=dialect, **options
    )
    weights, x = pack_head(model), start
    steps, times = step_coefficients(schedule, "cpu"), embed_timesteps(weights, schedule.timesteps)
    condition = embed_condition(weights, hidden)
    rows = torch.tensor(seeds).repeat_interleave(4), torch.arange(4).repeat(2)
    for i, k in enumerate(reversed(range(100))):
        modulation = modulations(weights, condition, times[k])
        x = denoise_step(
            x,
            modulation,
            weights,
            steps[k],
            LatentNoise(*rows, i),
            formula=dialect.guidance,
            clip=dialect.clip,
            **options,
        )
    assert error(x * dialect.scale, want) <= 1e-4 * want.abs().max().clamp_min(1.0)


def test_coefficients_are_the_schedule() -> None:
    schedule = diffusion_schedule(32)
    steps = step_coefficients(schedule, "cpu")
    assert (steps.shape, steps.dtype, steps.is_contiguous()) == ((32, 8), torch.float32, True)
    columns = dict(zip(Coefficients._fields, steps.double().T, strict=True))
    for name in Coefficients._fields[:6]:
        assert torch.equal(columns[name], torch.from_numpy(getattr(schedule, name)).float().double()), name
    assert columns["noisy"].tolist() == [0.0] + [1.0] * 31
    assert columns["timestep"].tolist() == list(schedule.timesteps)


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", MODES)
def test_last_step_ignores_the_noise(mode: str, backend: str | None) -> None:
    case = Case((4, 48, 1, 6), mode, torch.float32, k=0)
    device = "cuda" if backend == "triton" else "cpu"
    want = case.run(device, backend)
    assert torch.equal(case.run(device, backend, noise=torch.full_like(case.noise, float("nan"))), want)
    assert want.isfinite().all()


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "unguided"])
def test_guidance_may_be_a_tensor(mode: str, backend: str | None) -> None:
    """Of any value: 1 is guidance too, where the number 1 is none."""
    case = Case((4, 48, 1, 6), mode, torch.float32)
    device = "cuda" if backend == "triton" else "cpu"
    for number in (2.5, 0.0, 1.0):
        case.settings["guidance"] = torch.tensor(number, device=device)
        found = case.run(device, backend)
        case.settings["guidance"] = number + 1e-9  # not exactly 1
        assert error(found, case.run(device, backend)) < 1e-5


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", MODES)
def test_temperature_scales_the_noise(mode: str, backend: str | None) -> None:
    case = Case((4, 48, 1, 6), mode, torch.float32)
    device = "cuda" if backend == "triton" else "cpu"
    results = {}
    for case.settings["temperature"] in (0.0, 1.0, 2.0):
        results[case.settings["temperature"]] = case.run(device, backend)
    assert error(results[2.0] - results[0.0], 2 * (results[1.0] - results[0.0])) < 1e-5
    assert ((results[1.0] - results[0.0]) * case.noise > 0).all()


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", MODES)
def test_counter_noise_is_the_tensor_of_it(mode: str, backend: str | None) -> None:
    case = Case((66, 48, 1, 38), mode, torch.float32)
    rows = len(case.x)
    seeds = torch.tensor([0, 1, 2**32 + 5, 2**63 - 1]).repeat(rows)[:rows]
    device = "cuda" if backend == "triton" else "cpu"
    tokens = torch.arange(rows) * 977 % 1024
    drawn = LatentNoise(seeds, tokens, 31)
    got = case.run(device, backend, noise=LatentNoise(seeds.to(device), tokens.to(device), 31))
    assert error(got, case.run(device, backend, noise=drawn.normal(66))) < 2e-6
    assert error(got, case.run(device, backend, noise=LatentNoise(seeds, tokens, 30).normal(66))) > 1e-2


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
def test_rows_do_not_see_each_other(backend: str | None) -> None:
    """A row of NaN, infinity or numbers that overflow float16 changes itself (and its other half), and no other."""
    device = "cuda" if backend == "triton" else "cpu"
    for mode in MODES:
        for dtype in (torch.float32, torch.float16):
            case = Case((4, 48, 2, 70), mode, dtype)
            want, x = case.run(device, backend), case.x.clone()
            x[0], x[3], x[7] = float("nan"), float("inf"), 1e6
            got = case.run(device, backend, x=x)
            rows = {row + start for row in (0, 3, 7) for start in ((0, 35) if mode == "both halves" else (0,))}
            others = torch.tensor([row for row in range(len(x)) if row not in rows])
            assert torch.equal(got[others], want[others])
            assert got[[0, 3]].isnan().all()


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
def test_strides_do_not_matter(backend: str | None) -> None:
    device = "cuda" if backend == "triton" else "cpu"
    case = Case((6, 48, 2, 10), "guided", torch.float32)
    want = case.run(device, backend)
    apart = {
        "x": case.x.T.contiguous().T,
        "noise": case.noise.repeat(1, 2)[:, :6],
        "modulation": case.modulation.repeat(1, 2)[:, : case.modulation.shape[1]],
        "coefficients": case.coefficients.repeat_interleave(2)[::2],
    }
    assert torch.equal(case.run(device, backend, **apart), want)
    assert torch.equal(case.run(device, backend, modulation=case.modulation.T.contiguous().T), want)
    case.weights = HeadWeights(*(torch.stack([weight, weight + 1], dim=-1)[..., 0] for weight in case.weights))
    assert torch.equal(case.run(device, backend), want)


@pytest.mark.parametrize("backend", [*HERE, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode: str, backend: str | None) -> None:
    case = Case((4, 48, 1, 2), mode, torch.float32)
    none = {"x": case.x[:0], "modulation": case.modulation[:0], "noise": case.noise[:0]}
    got = case.run("cuda" if backend == "triton" else "cpu", backend, **none)
    assert (got.shape, got.dtype) == ((0, 4), torch.float32)


def test_packing_takes_a_copy() -> None:
    model = random_head(4, 16, 2)
    weights = pack_head(model)
    before = [weight.clone() for weight in weights]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert all(torch.equal(a, b + 1) for a, b in zip(pack_head(model), before, strict=True))
    low = pack_head(model, torch.bfloat16)
    assert {weight.dtype for weight in low} == {torch.bfloat16} and (low.width, low.channels, low.depth) == (16, 4, 2)


def test_modulations_are_the_modules() -> None:
    """Shift, scale and gate of every block, as its own linear makes them."""
    model, weights = random_head(4, 16, 3), pack_head(random_head(4, 16, 3))
    timesteps, condition = torch.tensor([0, 17, 999]), torch.randn(3, 7)
    y = model.time_embed(timesteps) + model.cond_embed(condition)
    layers = [*(block.adaLN_modulation for block in model.res_blocks), model.final_layer.adaLN_modulation]
    got = modulations(weights, embed_condition(weights, condition), embed_timesteps(weights, timesteps))
    assert error(got, torch.cat([layer(y) for layer in layers], dim=1)) < 1e-6


class Other(nn.Module):
    pass


def without_bias(model: DiffusionHead) -> DiffusionHead:
    model.res_blocks[1].mlp[2].bias = None
    return model


def with_eps(model: DiffusionHead) -> DiffusionHead:
    model.res_blocks[1].in_ln.eps = 1e-5
    return model


def with_affine(model: DiffusionHead) -> DiffusionHead:
    model.final_layer.norm_final = nn.LayerNorm(16, eps=1e-6)
    return model


def fixed_variance(model: DiffusionHead) -> DiffusionHead:
    model.final_layer.linear = nn.Linear(16, 4)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: Other(), "head is a Other, allowed is a SimpleMLPAdaLN.*time_embed"),
        (without_bias, "head has a layer without bias"),
        (with_eps, "head has 2 blocks with eps .*1e-05.*allowed is at least 1 block with eps 1e-06"),
        (lambda model: DiffusionHead(4, 7, 16, 0), "head has 0 blocks"),
        (with_affine, "head has an affine final norm"),
        (fixed_variance, "head has 4 outputs for 4 channels"),
    ],
)
def test_foreign_heads(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_head(change(random_head(4, 16, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x has shape \(3, 5\), allowed is \(R, 4\)"),
        ({"x": torch.zeros(3, 4).half()}, "x is torch.float16, allowed is torch.float32"),
        ({"x": torch.zeros(2, 4)}, "modulation has 6 rows for 2 of x, allowed under guidance"),
        ({"guidance": 1}, "modulation has 6 rows, allowed without guidance is one for each of x: 3"),
        ({"modulation": torch.zeros(6, 9)}, r"modulation has shape \(6, 9\), allowed is \(rows, 80\)"),
        ({"modulation": torch.zeros(5, 80)}, "modulation has 5 rows for 3 of x"),
        ({"modulation": torch.zeros(6, 80, dtype=torch.int64)}, "modulation is torch.int64"),
        ({"modulation": torch.zeros(6, 80, device="meta")}, "modulation is on meta"),
        ({"coefficients": torch.zeros(7)}, r"coefficients has shape \(7,\), allowed is \(8,?\)"),
        ({"coefficients": torch.zeros(8).double()}, "coefficients is torch.float64"),
        ({"noise": torch.zeros(3, 5)}, r"noise has shape \(3, 5\), allowed is \(3, 4\)"),
        ({"noise": torch.zeros(3, 4, dtype=torch.int64)}, "noise is torch.int64"),
        (
            {"noise": LatentNoise(torch.zeros(2, dtype=torch.int64), torch.arange(3), 0)},
            r"noise.seeds has shape \(2,\)",
        ),
        ({"noise": LatentNoise(torch.zeros(3), torch.arange(3), 0)}, "noise.seeds is torch.float32"),
        ({"noise": LatentNoise(torch.arange(3), torch.arange(3), -1)}, "noise.step is -1"),
        ({"noise": LatentNoise(torch.arange(3) - 1, torch.arange(3), 0)}, r"noise.seeds has values in -1..1"),
        ({"noise": LatentNoise(torch.arange(3), torch.arange(3) + 2**32, 0)}, "noise.tokens has values"),
        ({"guidance": float("nan")}, "guidance is nan, allowed is a finite number"),
        ({"guidance": torch.ones(1)}, r"guidance has shape \(1,\), allowed is \(\)"),
        ({"guidance": torch.tensor(2)}, "guidance is torch.int64, allowed are torch.float32 and numbers"),
        ({"guidance": torch.tensor(2.0, device="meta")}, "guidance is on meta"),
        ({"guidance": torch.tensor(2.0, requires_grad=True)}, "guidance requires a gradient"),
        ({"temperature": "1"}, "temperature is '1', allowed is a finite number"),
        ({"clip": 1}, "clip is 1, allowed are True and False"),
        ({"weights": None}, "weights is a NoneType, allowed are HeadWeights"),
        ({"formula": "c-u"}, "formula is 'c-u', allowed are 'c.s"),
        ({"x": torch.zeros(3, 4).requires_grad_()}, "x requires a gradient, which denoise_step does not have"),
        ({"modulation": torch.zeros(6, 80).requires_grad_()}, "modulation requires a gradient"),
        ({"backend": "native"}, "denoise_step has no native implementation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    case = Case((4, 16, 1, 6), "guided", torch.float32)
    arguments = {"x": case.x, "modulation": case.modulation, "weights": case.weights}
    arguments |= {"coefficients": case.coefficients, "noise": case.noise, **case.settings, **change}
    with pytest.raises(ValueError, match=message):
        denoise_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_weight": torch.zeros(2, 16, 15)}, r"weights.hidden_weight has shape \(2, 16, 15\)"),
        ({"norm_bias": torch.zeros(1, 16)}, r"weights.norm_bias has shape \(1, 16\), allowed is \(2, 16\)"),
        ({"output_bias": torch.zeros(4)}, r"weights.output_bias has shape \(4,\), allowed is \(8,?\)"),
        ({"block_bias": torch.zeros(2, 16).half()}, "weights.block_bias is torch.float16, allowed is.*torch.float32"),
        ({"block_bias": torch.zeros(2, 16, device="meta")}, "weights.block_bias is on meta"),
        ({"input_weight": torch.zeros(16, 4).double()}, "weights are torch.float64"),
        ({"block_bias": torch.zeros(2, 16).requires_grad_()}, "block_bias requires a gradient"),
        ({"hidden_weight": None}, "weights.hidden_weight is a NoneType, allowed is a tensor"),
        ({"input_weight": torch.zeros(16)}, r"weights.input_weight has shape \(16,\), allowed is \(W, C\)"),
    ],
)
def test_bad_weights(change: dict, message: str) -> None:
    case = Case((4, 16, 2, 6), "guided", torch.float32)
    weights = case.weights._replace(**change)
    with pytest.raises(ValueError, match=message):
        denoise_step(case.x, case.modulation, weights, case.coefficients, case.noise, **case.settings)


def graph_inputs(mode: str) -> tuple[Case, LatentNoise]:
    case = Case((4, 16, 2, 6), mode, torch.float32)
    return case, LatentNoise(torch.arange(len(case.x)), torch.arange(len(case.x)), 2)


@pytest.mark.parametrize("counter", [False, True])
def test_torch_library(counter: bool) -> None:
    case, drawn = graph_inputs("guided")
    noise = (None, drawn.seeds, drawn.tokens, 2) if counter else (case.noise, None, None, 0)
    for stored in (None, torch.tensor(2.5)):
        settings = (*case.settings.values(), stored, None)
        arguments = (case.x, case.modulation, list(case.weights), case.coefficients, *noise, *settings)
        torch.library.opcheck(torch.ops.dcar_fast.denoise_step.default, arguments)


@pytest.mark.parametrize("counter", [False, True])
def test_torch_compile(counter: bool) -> None:
    case, drawn = graph_inputs("both halves")
    noise = drawn if counter else case.noise
    compiled = torch.compile(denoise_step, fullgraph=True, backend="aot_eager")
    got = compiled(case.x, case.modulation, case.weights, case.coefficients, noise, **case.settings)
    assert torch.equal(got, case.run(noise=noise))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_with_changing_numbers_and_rows(dynamic: bool | None) -> None:
    first = Case((4, 16, 2, 6), "guided", torch.float32)

    def step(x: Tensor, modulation: Tensor, noise: Tensor, guidance: float, temperature: float) -> Tensor:
        settings = {"guidance": guidance, "temperature": temperature, "formula": "c+s(c-u)", "clip": True}
        return denoise_step(x, modulation, first.weights, first.coefficients, noise, **settings)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, guidance, temperature in ((6, 2.0, 1.0), (6, 3.0, 0.5), (10, 4.5, 1.0), (2, 2.0, 0.9), (64, 1.5, 1.0)):
        case = Case((4, 16, 2, rows), "guided", torch.float32)
        arguments = (case.x, case.modulation, case.noise, guidance, temperature)
        assert torch.equal(compiled(*arguments), step(*arguments))


def test_helpers_refuse_nonsense() -> None:
    case = Case((4, 16, 2, 6), "guided", torch.float32)
    for dtype in ("float32", 3, torch.int64):
        with pytest.raises(ValueError, match="dtype is .*, allowed are None and floating-point types"):
            pack_head(random_head(4, 16, 2), dtype)
    with pytest.raises(ValueError, match="schedule is a NoneType, allowed is a Schedule"):
        step_coefficients(None, "cpu")
    with pytest.raises(ValueError, match=r"timesteps has shape \(1, 2\), allowed is \(K\)"):
        embed_timesteps(case.weights, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"condition has shape \(6, 15\), allowed is \(rows, 16\)"):
        modulations(case.weights, torch.zeros(6, 15), torch.zeros(16))
    with pytest.raises(ValueError, match=r"time has shape \(15,\), allowed is \(16\)"):
        modulations(case.weights, torch.zeros(6, 16), torch.zeros(15))


def test_export() -> None:
    case, _ = graph_inputs("guided")

    class Step(nn.Module):
        def forward(self, x: Tensor, modulation: Tensor, noise: Tensor) -> Tensor:
            return denoise_step(x, modulation, case.weights, case.coefficients, noise, **case.settings)

    inputs = (case.x, case.modulation, case.noise)
    program = torch.export.export(Step(), inputs)
    assert any(node.target is torch.ops.dcar_fast.denoise_step.default for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), case.run())
