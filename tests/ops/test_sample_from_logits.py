"""sample_from_logits: the formula spelled out, float64, what is no number, ties, frequencies, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dcar_fast import ops
from dcar_fast.noise import CounterNoise, TokenNoise
from dcar_fast.ops import _native
from tests.ops.sampling_cases import (
    GPU,
    HERE,
    SETTINGS,
    annealed,
    by_hand,
    check_sample,
    chi_square,
    counters,
    draws,
    normals,
    skip_unless_built,
    to,
)
from tests.tolerance import HALF_ULP

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# around the C++ kernel's chunk of 512 and the Triton kernel's blocks of 1024 and 2048
SHAPES = [(1, 1), (5, 7), (0, 4), (3, 130), (4, 511), (4, 512), (4, 513), (2, 2049), (3, 16384), (1, 65536)]


def sample(cond, uncond=None, *, noise, backend=None, **settings):
    return ops.sample_from_logits(cond, uncond, noise=noise, backend=backend, **{**SETTINGS, **settings})


def check(got, cond: Tensor, uncond: Tensor | None, noise, guidance, softmax_temperature, tau) -> None:
    wide, plain = (
        annealed(cond, uncond, guidance, softmax_temperature, dtype) for dtype in (torch.float64, torch.float32)
    )
    largest = cond.abs().max().item() if cond.numel() else 0.0
    rounding = 16 * HALF_ULP * (1 + 2 * guidance) * largest / softmax_temperature
    check_sample(got, wide, plain, noise, tau, rounding)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("rows, codes", [(1, 1), (5, 7), (3, 130), (0, 4)])
def test_the_formula_by_hand(backend, rows, codes, guided):
    skip_unless_built(backend)
    cond, uncond = normals(rows, codes), normals(rows, codes, seed=1) if guided else None
    u = draws(rows, codes)
    ids, confidence = sample(cond, uncond, noise=u, backend=backend)
    expected_ids, expected = by_hand(cond, uncond, u, **SETTINGS)
    assert ids.dtype == torch.int64 and confidence.dtype == torch.float32
    assert ids.tolist() == expected_ids.tolist()
    assert torch.allclose(confidence.double(), expected.double(), atol=1e-5)


def inputs(shape, dtype, guided, counted):
    cond, uncond = normals(*shape, dtype=dtype), normals(*shape, seed=1, dtype=dtype) if guided else None
    return cond, uncond, counters(shape[0]) if counted else draws(*shape, seed=2)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(backend, shape, counted):
    skip_unless_built(backend)
    for dtype, guided, tau in itertools.product(DTYPES, (True, False), (0.0, 0.7, 5.0)):
        cond, uncond, noise = inputs(shape, dtype, guided, counted)
        settings = SETTINGS | {"tau": tau}
        check(sample(cond, uncond, noise=noise, backend=backend, tau=tau), cond, uncond, noise, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_on_a_gpu(backend, shape, counted):
    for dtype, guided, tau in itertools.product(DTYPES, (True, False), (0.0, 0.7, 5.0)):
        cond, uncond, noise = inputs(shape, dtype, guided, counted)
        on_gpu = cond.cuda(), None if uncond is None else uncond.cuda()
        got = sample(*on_gpu, noise=to(noise, "cuda"), backend=backend, tau=tau)
        check(got, cond, uncond, noise, **(SETTINGS | {"tau": tau}))


def native(isa: str, threads: int, cond: Tensor, uncond: Tensor, noise: TokenNoise, tau: float):
    """The C++ kernel for one instruction set and number of threads."""
    ids, confidence = torch.empty(len(cond), dtype=torch.int64), torch.empty(len(cond))
    _native.module().sample_from_logits(
        **{"cond": cond.data_ptr(), "uncond": uncond.data_ptr(), "uniforms": 0, "seeds": noise.seeds.data_ptr()},
        **{"tokens": noise.tokens.data_ptr(), "ids": ids.data_ptr(), "confidence": confidence.data_ptr()},
        **{"rows": cond.shape[0], "columns": cond.shape[1], "cond_stride": cond.stride(0), "step": noise.step},
        **{"uncond_stride": uncond.stride(0), "dtype": str(cond.dtype).removeprefix("torch.")},
        **{**SETTINGS, "tau": tau, "num_threads": threads, "isa": isa},
    )
    return ids, confidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 0.7, 30.0])
def test_instruction_sets_and_threads_agree_bit_for_bit(dtype, tau):
    skip_unless_built("native")
    cond, uncond, noise = normals(33, 3001, dtype=dtype), normals(33, 3001, seed=1, dtype=dtype), counters(33)
    want = native("generic", 1, cond, uncond, noise, tau)
    check(want, cond, uncond, noise, **(SETTINGS | {"tau": tau}))
    odd = cond.clone()
    odd[:9, ::3], odd[5:12, 1::3], odd[10:14, 7], odd[14] = math.nan, -math.inf, math.inf, math.nan
    reference = sample(odd, uncond, noise=noise, tau=tau, backend="reference")
    for isa, threads in itertools.product(_native.module().cpu_isas(), (1, 3, 64)):
        got = native(isa, threads, cond, uncond, noise, tau)
        assert all(map(torch.equal, got, want)), (isa, threads)
        assert all(map(torch.equal, native(isa, threads, odd, uncond, noise, tau), reference)), (isa, threads)


@pytest.mark.parametrize("backend", HERE)
def test_what_is_no_number_is_never_drawn(backend):
    skip_unless_built(backend)
    nan, inf = math.nan, math.inf
    rows = [[nan, 0.0, -1.0], [nan] * 3, [-inf] * 3, [-inf, -5.0, nan], [1.0, inf, inf], [nan, -inf, -inf]]
    for counted, tau in itertools.product((True, False), (0.0, 1e-3)):
        noise = counters(6) if counted else draws(6, 3)
        ids, confidence = sample(
            torch.tensor(rows), guidance=0.0, softmax_temperature=1.0, tau=tau, noise=noise, backend=backend
        )
        assert ids.tolist() == [1, 0, 0, 1, 1, 0]
        assert confidence.tolist() == [0.0, -inf, -inf, -5.0, inf, -inf]


@pytest.mark.parametrize("backend", HERE)
def test_infinities_under_guidance(backend):
    """inf - inf is NaN, which is never drawn; what is left follows the arithmetic."""
    skip_unless_built(backend)
    inf = math.inf
    cond = torch.tensor([[inf, 1.0, -inf], [inf, inf, 0.0], [-inf, 0.0, 1.0], [0.0, 0.0, 1.0]])
    uncond = torch.tensor([[inf, 1.0, -inf], [0.0, -inf, 0.0], [-inf, 0.0, inf], [-inf, 2.0, 1.0]])
    ids, confidence = sample(cond, uncond, noise=counters(4), tau=0.0, softmax_temperature=1.0, backend=backend)
    assert ids.tolist() == [1, 0, 1, 0]
    assert confidence.tolist() == [1.0, inf, 0.0, inf]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("codes", [9, 600, 5000])
def test_ties_go_to_the_lowest_id(backend, codes):
    skip_unless_built(backend)
    for value in (0.0, -3.0, 1e30, -1e30, math.inf):
        cond = torch.full((2, codes), value)
        cond[1, : codes // 2] = -1e35
        ids, _ = sample(cond, noise=counters(2), tau=0.0, backend=backend)
        assert ids.tolist() == [0, codes // 2]
    # equal uniforms: sums tie, too
    ids, _ = sample(torch.zeros(2, codes), noise=torch.full((2, codes), 0.3), tau=1.0, backend=backend)
    assert ids.tolist() == [0, 0]


@pytest.mark.parametrize("backend", HERE)
def test_logits_that_only_the_division_makes_equal(backend):
    """x < y with x / 1.5 == y / 1.5 in float32: the lower id, not the larger logit before the division."""
    skip_unless_built(backend)
    values = 1.5 + torch.arange(40) * 2.0**-23
    quotients = values / 1.5
    first = next(i for i in range(39) if quotients[i] == quotients[i + 1])
    ids, _ = sample(
        values[None, first : first + 2], noise=counters(1), tau=0.0, softmax_temperature=1.5, backend=backend
    )
    assert ids.item() == 0


@pytest.mark.parametrize("backend", HERE)
def test_recorded_edges_are_safe(backend):
    skip_unless_built(backend)
    edges = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.5, 1.0]])
    ids, confidence = sample(torch.zeros(3, 3), noise=edges, backend=backend)
    assert ids.tolist() == [1, 0, 0], "u = 1 is the largest noise, and finite"
    assert confidence.tolist() == [0.0, 0.0, 0.0]
    foreign = torch.tensor([[math.nan, 2.0, -1.0]]).repeat(4, 700)
    ids, _ = sample(torch.zeros(4, 2100), noise=foreign, backend=backend)
    assert ((ids >= 0) & (ids < 2100)).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "change",
    [
        {"softmax_temperature": 1e-40},
        {"softmax_temperature": 1e-40, "tau": 1e36},
        {"softmax_temperature": 1e-30},
        {"softmax_temperature": 3e38},
        {"tau": 1e-40},
        {"tau": 1e30},
        {"tau": 1e38},
        {"guidance": 1e30},
        {"softmax_temperature": 1e-300},  # float32: 0, infinity, infinity
        {"softmax_temperature": 1e300},
        {"tau": 1e300},
        {"guidance": -3.0},
        {"guidance": 0},
        {"tau": 1, "softmax_temperature": 1},
    ],
    ids=str,
)
def test_extreme_settings_are_the_references(backend, change):
    skip_unless_built(backend)
    cond, uncond, noise = normals(6, 700), normals(6, 700, seed=1), counters(6)
    cond[0, 5], cond[1], cond[2, 3] = 0.0, 0.0, -math.inf
    cond[3] = uncond[3] = -1e-4 * cond[3].abs()
    want = sample(cond, uncond, noise=noise, backend="reference", **change)
    got = sample(cond, uncond, noise=noise, backend=backend, **change)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_ends_of_the_range(backend, dtype):
    """Largest finite logits: guidance leaves float16's range, and in float32 it overflows to infinity."""
    skip_unless_built(backend)
    most = torch.finfo(dtype).max
    cond, uncond = torch.full((2, 5), -most, dtype=dtype), torch.full((2, 5), most, dtype=dtype)
    cond[0, 3], uncond[0, 3] = most, -most
    ids, confidence = sample(cond, uncond, noise=counters(2), backend=backend)
    want = sample(cond, uncond, noise=counters(2), backend="reference")
    assert ids.tolist() == want[0].tolist() == [3, ids[1].item()]
    assert torch.equal(confidence, want[1])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("codes", [1, 513, 65536])
def test_the_last_id(backend, codes):
    skip_unless_built(backend)
    cond = normals(2, codes)
    cond[:, -1] = 100.0
    ids, confidence = sample(cond, noise=counters(2), backend=backend)
    assert ids.tolist() == [codes - 1] * 2 and torch.allclose(confidence, torch.tensor(125.0))


@pytest.mark.parametrize("backend", HERE)
def test_tau_to_zero_is_argmax(backend):
    skip_unless_built(backend)
    cond, uncond = normals(9, 300), normals(9, 300, seed=1)
    want = annealed(cond, uncond, 3.5, 0.8, torch.float64).argmax(1)
    for tau in (0, 0.0, 1e-8):
        assert torch.equal(sample(cond, uncond, noise=counters(9), tau=tau, backend=backend)[0], want)


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend):
    skip_unless_built(backend)
    for dtype in (torch.float32, torch.bfloat16):
        cond, uncond, u = normals(6, 530, dtype=dtype), normals(6, 530, seed=1, dtype=dtype), draws(6, 530)
        noise = counters(6)
        for counted in (True, False):
            want = sample(cond, uncond, noise=noise if counted else u, backend=backend)
            strided_seeds = torch.stack([noise.seeds, noise.seeds - 1], 1)[:, 0]
            strided = TokenNoise(strided_seeds, noise.tokens.flip(0).contiguous().flip(0), 3) if counted else u.T
            strided = strided if counted else strided.contiguous().T
            wide = torch.cat([cond, cond + 1], 1)[:, :530]
            got = sample(wide, uncond.T.contiguous().T, noise=strided, backend=backend)
            assert all(map(torch.equal, got, want))
    row = normals(1, 40)
    got = sample(row.expand(6, 40), noise=counters(6), backend=backend)
    assert all(map(torch.equal, got, sample(row.repeat(6, 1), noise=counters(6), backend=backend)))


@pytest.mark.parametrize("backend", HERE)
def test_many_rows(backend):
    skip_unless_built(backend)
    cond, noise = normals(65_537, 3), counters(65_537)
    check(sample(cond, noise=noise, backend=backend), cond, None, noise, **SETTINGS)


def test_a_million_draws_are_distributed_as_the_softmax():
    rows, logits = 1_000_000, torch.tensor([0.0, 1.0, -0.5, 2.0, -4.0, 0.3, 0.0])
    noise = TokenNoise(torch.arange(rows) // 256, torch.arange(rows) % 256, 0)
    plain = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.0}
    backend = "native" if _native.cpu_usable(torch.device("cpu")).ok else "reference"
    ids, confidence = sample(logits.expand(rows, 7), noise=noise, backend=backend, **plain)
    assert chi_square(ids, logits) < 22.46  # 0.999 quantile, 6 degrees of freedom; the seeds are fixed
    assert torch.equal(confidence, logits[ids])


@pytest.mark.gpu
def test_a_million_draws_on_a_gpu_are_those_of_the_cpu():
    rows, logits = 1_000_000, torch.tensor([0.0, 1.0, -0.5, 2.0, -4.0, 0.3, 0.0])
    noise = TokenNoise(torch.arange(rows) // 256, torch.arange(rows) % 256, 0)
    plain = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.0}
    here, _ = sample(logits.expand(rows, 7), noise=noise, **plain)
    there, _ = sample(logits.cuda().expand(rows, 7), noise=to(noise, "cuda"), backend="triton", **plain)
    assert (here != there.cpu()).sum() <= 2  # sums that tie but for the last bit of a logarithm


@pytest.mark.parametrize("backend", HERE)
def test_token_noise_is_the_counter_noise_of_the_rows(backend):
    skip_unless_built(backend)
    whole = CounterNoise([5, 2**63 - 1], num_tokens=6, codebook_size=11, latent_channels=4).token(3)
    rows = [(0, 2), (1, 5), (1, 0), (0, 0)]
    seeds = torch.tensor([[5, 2**63 - 1][b] for b, _ in rows])
    noise = ops.TokenNoise(seeds, torch.tensor([t for _, t in rows]), 3)
    cond, uncond = normals(4, 11), normals(4, 11, seed=1)
    counted = sample(cond, uncond, noise=noise, backend=backend)
    given = sample(cond, uncond, noise=torch.stack([whole[b, t] for b, t in rows]), backend=backend)
    assert all(map(torch.equal, counted, given))


def test_no_gradient_comes_out():
    ids, confidence = sample(normals(2, 5).requires_grad_(), normals(2, 5).requires_grad_(), noise=counters(2))
    assert not ids.requires_grad and not confidence.requires_grad


OP_INPUTS = [
    (normals(3, 20), normals(3, 20, seed=1), None, counters(3).seeds, counters(3).tokens, 2, 3.5, 0.8, 0.7, None),
    (normals(3, 20), None, draws(3, 20), None, None, 0, 0.0, 1.0, 0.0, "reference"),
]


@pytest.mark.parametrize("arguments", OP_INPUTS, ids=["counted", "recorded"])
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.dcar_fast.sample_from_logits.default, arguments)


def test_compiled_and_exported():
    cond, uncond = normals(4, 30), normals(4, 30, seed=1)

    def call(cond, uncond, noise, tau):
        return sample(cond, uncond, noise=noise, tau=tau)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for step, tau in ((0, 0.7), (1, 0.5), (2, 0.0)):
        noise = counters(4, step)
        assert all(map(torch.equal, compiled(cond, uncond, noise, tau), call(cond, uncond, noise, tau)))

    class Module(torch.nn.Module):
        def forward(self, cond, uncond, seeds, tokens):
            return sample(cond, uncond, noise=TokenNoise(seeds, tokens, 2))

    noise = counters(4, 2)
    arguments = (cond, uncond, noise.seeds, noise.tokens)
    exported = torch.export.export(Module(), arguments)
    assert "dcar_fast.sample_from_logits" in str(exported.graph)
    assert all(map(torch.equal, exported.module()(*arguments), call(cond, uncond, noise, 0.7)))


COND = torch.zeros(2, 6)
SEEDS, TOKENS = torch.zeros(2).long(), torch.zeros(2).long()


def _sample(cond=COND, uncond=None, noise=None, **settings):
    sample(cond, uncond, noise=torch.zeros(2, 6) if noise is None else noise, **settings)


BAD = [
    ("cond", lambda: _sample(cond=COND.long())),
    ("cond", lambda: _sample(cond=COND[0])),
    ("cond", lambda: _sample(cond=torch.zeros(2, 0), noise=torch.zeros(2, 0))),
    ("cond", lambda: _sample(cond=[[0.0]])),
    ("uncond", lambda: _sample(uncond=COND[:1])),
    ("uncond", lambda: _sample(uncond=COND.to("meta"))),
    ("guidance", lambda: _sample(guidance=math.nan)),
    ("guidance", lambda: _sample(guidance=torch.tensor(1.0))),
    ("softmax_temperature", lambda: _sample(softmax_temperature=0.0)),
    ("softmax_temperature", lambda: _sample(softmax_temperature=math.inf)),
    ("tau", lambda: _sample(tau=-0.1)),
    ("tau", lambda: _sample(tau=math.nan)),
    ("tau", lambda: _sample(tau=None)),
    ("noise", lambda: _sample(noise=torch.zeros(2, 5))),
    ("noise", lambda: _sample(noise=torch.zeros(2, 6).long())),
    ("noise", lambda: _sample(noise=torch.zeros(2, 6, device="meta"))),
    ("noise.seeds", lambda: _sample(noise=ops.TokenNoise(SEEDS[:1], TOKENS, 0))),
    ("noise.seeds", lambda: _sample(noise=ops.TokenNoise(SEEDS.int(), TOKENS, 0))),
    ("noise.seeds has values in -1..0", lambda: _sample(noise=ops.TokenNoise(torch.tensor([-1, 0]), TOKENS, 0))),
    ("noise.tokens has values in 0..4294967296", lambda: _sample(noise=TokenNoise(SEEDS, torch.tensor([0, 2**32]), 0))),
    ("noise.tokens has values in -3..0", lambda: _sample(noise=ops.TokenNoise(SEEDS, torch.tensor([0, -3]), 0))),
    ("noise.step is -1", lambda: _sample(noise=ops.TokenNoise(SEEDS, TOKENS, -1))),
    ("noise.step is 4294967296", lambda: _sample(noise=ops.TokenNoise(SEEDS, TOKENS, 2**32))),
    ("noise.step is 1.5", lambda: _sample(noise=ops.TokenNoise(SEEDS, TOKENS, 1.5))),
    ("backend", lambda: _sample(backend="cuda")),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": 0}, "cond is a null pointer"),
        ({"cond": 2}, "cond is not aligned to 4"),
        ({"uncond": 2}, "uncond is not aligned"),
        ({"uniforms": 3}, "uniforms is not aligned"),
        ({"seeds": 0}, "seeds is a null pointer"),
        ({"tokens": 4}, "tokens is not aligned"),
        ({"ids": 0}, "ids is a null pointer"),
        ({"confidence": 2}, "confidence is not aligned"),
        ({"rows": -1}, "rows is -1"),
        ({"columns": 0}, "columns is 0"),
        ({"cond_stride": -1}, "cond_stride is -1"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"isa": "sse9"}, "isa is 'sse9'"),
        ({"rows": 2**40, "columns": 2**40}, "cond has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change, message):
    skip_unless_built("native")
    addresses = dict.fromkeys(("cond", "seeds", "tokens", "ids", "confidence"), 8) | {"uncond": 0, "uniforms": 0}
    sizes = {"rows": 1, "columns": 1, "cond_stride": 1, "uncond_stride": 0, "step": 0, "num_threads": 1}
    with pytest.raises(ValueError, match=message):
        _native.module().sample_from_logits(**{**addresses, **sizes, **SETTINGS, "dtype": "float32", **change})


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("tau", [1e-30, 1e-34, 1e-37, 1e-38, 1e-45])
def test_noise_too_small_to_matter_decides_ties(backend, tau):
    skip_unless_built(backend)
    logits, noise = torch.zeros(60, 600), counters(60)
    got = sample(logits, noise=noise, backend=backend, tau=tau, guidance=0.0)
    assert torch.equal(got[0], sample(logits, noise=noise, backend="reference", tau=tau, guidance=0.0)[0])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_logits_that_overflow_tie_to_the_lowest(backend, tau):
    skip_unless_built(backend)
    logits = torch.zeros(1, 600)
    logits[0, 3], logits[0, 9] = 2.7336674e38, torch.finfo(torch.float32).max
    got = sample(logits, noise=counters(1), backend=backend, tau=tau, softmax_temperature=0.80335265)
    assert got[0].tolist() == [3] and got[1].tolist() == [math.inf]
