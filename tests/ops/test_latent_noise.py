"""Every implementation of latent_noise: the words of noise.py, Box-Muller to within rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.noise import STREAM_LATENT, STREAM_LATENT_INIT, CounterNoise, uniform
from dcar_fast.ops import _native, latent_noise
from dcar_fast.reference.latent_noise import latent_noise as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
HERE = ["reference", "native", None]
GPU = ["reference", "triton", None]
SEEDS = (0, 2**63 - 1, 5, 2**32, 2**32 - 1, 0x0123456789ABCDEF)
ULP = 2.0**-23


def skip_unless_built(backend: str | None) -> None:
    if backend == "native" and not (usable := _native.cpu_usable(CPU)).ok:
        pytest.skip(usable.reason)


def rows_of(count: int) -> tuple[Tensor, Tensor]:
    """Seeds and tokens, their extremes among them, in no order."""
    seeds = torch.tensor(SEEDS).repeat(count // len(SEEDS) + 1)[:count]
    tokens = torch.arange(count) * 37 % 1024
    tokens[1:2] = 2**32 - 1
    return seeds, tokens


def truth(seeds: Tensor, tokens: Tensor, channels: int, step: int, initial: bool) -> Tensor:
    """Box-Muller in float64 on the exact uniforms."""
    stream = STREAM_LATENT_INIT if initial else STREAM_LATENT
    pairs = -(-channels // 4) * 2
    u = uniform(seeds, tokens, 2 * pairs, step, stream).double().view(-1, pairs, 2)
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :channels]


def check(got: Tensor, seeds: Tensor, tokens: Tensor, channels: int, step: int, initial: bool, ulps: float) -> None:
    want = truth(seeds, tokens, channels, step, initial)
    assert got.dtype == torch.float32 and got.shape == want.shape and got.is_contiguous()
    check_close(got, reference(seeds, tokens, channels, step, initial=initial), want)
    if got.numel():  # a wrong word would be off by far more
        assert ((got.double() - want).abs() <= ulps * ULP * (want.abs() + 1)).all()


@pytest.mark.parametrize("backend", HERE)
def test_float64_agrees(backend: str | None) -> None:
    """The reference's angles are rounded at 2 pi, the kernels' are exact."""
    skip_unless_built(backend)
    for rows, channels in ((1, 1), (7, 2), (13, 3), (64, 4), (65, 5), (70, 32), (3, 130), (300, 31)):
        seeds, tokens = rows_of(rows)
        for step, initial in ((0, True), (0, False), (9, False), (2**32 - 1, False)):
            got = latent_noise(seeds, tokens, channels, step, initial=initial, backend=backend)
            check(got, seeds, tokens, channels, step, initial, 16 if backend == "reference" else 5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
def test_float64_agrees_on_a_gpu(backend: str | None) -> None:
    for rows, channels in ((1, 1), (13, 3), (65, 5), (70, 32), (3, 130), (4096, 32)):
        seeds, tokens = rows_of(rows)
        for step, initial in ((0, True), (9, False), (2**32 - 1, False)):
            got = latent_noise(seeds.cuda(), tokens.cuda(), channels, step, initial=initial, backend=backend)
            check(got.cpu(), seeds, tokens, channels, step, initial, 16 if backend == "reference" else 5)


@pytest.mark.parametrize("backend", HERE)
def test_is_the_noise_of_an_image(backend: str | None) -> None:
    skip_unless_built(backend)
    seeds = [3, 2**63 - 1]
    noise = CounterNoise(seeds, num_tokens=9, codebook_size=8, latent_channels=6)
    rows = torch.tensor(seeds).repeat_interleave(9), torch.arange(9).repeat(2)
    for want, step, initial in ((noise.latent_init(), 0, True), (noise.latent(4), 4, False)):
        got = latent_noise(*rows, 6, step, initial=initial, backend=backend)
        assert (got.view(2, 9, 6) - want).abs().max() < 3e-6


def instruction_sets() -> list[str]:
    return _native.module().cpu_isas() if _native.cpu_usable(CPU).ok else ["none"]


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa: str) -> None:
    skip_unless_built("native")
    seeds, tokens = rows_of(101)
    for channels in (3, 32):
        out = torch.full((101, channels), float("nan"))
        addresses = {"seeds": seeds.data_ptr(), "tokens": tokens.data_ptr(), "out": out.data_ptr()}
        settings = {"rows": 101, "channels": channels, "step": 5, "initial": False, "num_threads": 1, "isa": isa}
        _native.module().latent_noise(**addresses, **settings)
        check(out, seeds, tokens, channels, 5, False, 5)


@pytest.mark.parametrize("backend", ["native", None])
def test_hundreds_of_thousands_are_normal_and_close(backend: str | None) -> None:
    """Every octave of u and every part of the turn."""
    skip_unless_built(backend)
    seeds, tokens = torch.arange(20_000) * 2**30, torch.arange(20_000)
    got = latent_noise(seeds, tokens, 16, 1, initial=False, backend=backend)
    check(got, seeds, tokens, 16, 1, False, 5)
    assert abs(got.mean()) < 0.01 and abs(got.std() - 1) < 0.01 and got.abs().max() > 4.2


@pytest.mark.parametrize("backend", HERE)
def test_empty_and_many_rows(backend: str | None) -> None:
    skip_unless_built(backend)
    none = torch.zeros(0, dtype=torch.int64)
    assert latent_noise(none, none, 5, 0, initial=True, backend=backend).shape == (0, 5)
    rows = torch.arange(65_537)
    got = latent_noise(rows, rows, 2, 3, initial=False, backend=backend)
    last = latent_noise(rows[-3:], rows[-3:], 2, 3, initial=False, backend=backend)
    assert torch.equal(got[-3:], last) and len(got.unique(dim=0)) == 65_537


@pytest.mark.parametrize("backend", HERE)
def test_threads_strides_and_neighbours_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    seeds, tokens = rows_of(1500)
    want = latent_noise(seeds, tokens, 30, 3, initial=False, backend=backend)
    both = torch.stack((seeds, tokens), 1)
    assert torch.equal(latent_noise(both[:, 0], both[:, 1], 30, 3, initial=False, backend=backend), want)
    repeated = latent_noise(seeds[2].expand(9), tokens[2].expand(9), 30, 3, initial=False, backend=backend)
    assert torch.equal(repeated, want[2].expand(9, 30))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(latent_noise(seeds, tokens, 30, 3, initial=False, backend=backend), want)
    finally:
        torch.set_num_threads(before)


ROWS = torch.arange(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ROWS.float()}, "seeds is torch.float32, allowed is torch.int64"),
        ({"seeds": ROWS[None]}, r"seeds has shape \(1, 3\), allowed is \(R\)"),
        ({"seeds": [1]}, "seeds is a list"),
        ({"tokens": ROWS[:2]}, r"tokens has shape \(2,\), allowed is \(3\)"),
        ({"tokens": ROWS.int()}, "tokens is torch.int32"),
        ({"tokens": ROWS.to("meta")}, "tokens is on meta, allowed is the device of seeds, cpu"),
        ({"channels": 0}, r"channels is 0, allowed is an integer in 1\.\."),
        ({"channels": True}, "channels is True"),
        ({"channels": 2.0}, "channels is 2.0"),
        ({"step": -1}, r"step is -1, allowed are 0\.\.4294967295"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"initial": 1}, "initial is 1, allowed are True and False"),
        ({"backend": "fastest"}, "backend is 'fastest'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"seeds": ROWS, "tokens": ROWS, "channels": 4, "step": 0, "initial": False}
    with pytest.raises(ValueError, match=f"^{message}"):
        latent_noise(**{**arguments, **change})


@pytest.mark.parametrize("backend", HERE)
def test_values_out_of_range(backend: str | None) -> None:
    skip_unless_built(backend)
    for seeds, tokens, name in (
        ([0, -1], [0, 0], "seeds"),
        ([0, 1], [0, -1], "tokens"),
        ([0, 1], [2**32, 0], "tokens"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} has .*, allowed are 0\.\."):
            latent_noise(torch.tensor(seeds), torch.tensor(tokens), 4, 0, initial=False, backend=backend)


def test_opcheck() -> None:
    for backend in ("reference", "native"):
        skip_unless_built(backend)
        torch.library.opcheck(torch.ops.dcar_fast.latent_noise.default, (ROWS, ROWS, 5, 2, True, backend))


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler needs a torch.empty of its own
    torch.compiler.reset()
    compiled = torch.compile(lambda s, t, c, i: latent_noise(s, t, c, i, initial=False) + 1, fullgraph=True)
    for rows, channels, step in ((5, 8, 0), (5, 8, 3), (9, 3, 4)):
        seeds, tokens = rows_of(rows)
        got = compiled(seeds, tokens, channels, step)
        assert torch.equal(got, latent_noise(seeds, tokens, channels, step, initial=False) + 1)


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, seeds: Tensor, tokens: Tensor) -> Tensor:
            return latent_noise(seeds, tokens, 6, 2, initial=True)

    rows = torch.export.Dim("rows")
    exported = torch.export.export(Model(), (ROWS, ROWS + 1), dynamic_shapes=({0: rows}, {0: rows}))
    assert any(node.target is torch.ops.dcar_fast.latent_noise.default for node in exported.graph.nodes)
    seeds, tokens = rows_of(11)
    assert torch.equal(exported.module()(seeds, tokens), latent_noise(seeds, tokens, 6, 2, initial=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds is a null pointer"),
        ({"out": 0}, "out is a null pointer"),
        ({"tokens": 4}, "tokens is not aligned to 8"),
        ({"rows": -1}, "rows is -1"),
        ({"channels": 0}, "channels is 0"),
        ({"step": -1}, "step is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"isa": "mmx"}, "isa is 'mmx'"),
        ({"rows": 2**40, "channels": 2**40}, "out has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    arguments = {"seeds": 8, "tokens": 8, "out": 8, "rows": 1, "channels": 1, "step": 0}
    with pytest.raises(ValueError, match=message):
        _native.module().latent_noise(**{**arguments, "initial": False, "num_threads": 1, **change})
