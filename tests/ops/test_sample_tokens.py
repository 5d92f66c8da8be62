"""sample_tokens: the logits head, then the sampling; bad input."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from dcar_fast import ops
from dcar_fast.noise import TokenNoise
from dcar_fast.tuning import DOES_NOT_FIT
from tests.ops.sampling_cases import (
    GPU,
    HERE,
    SETTINGS,
    by_hand,
    check_head,
    counters,
    draws,
    normals,
    rounded_hidden,
    skip_unless_built,
    to,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (R, D, V): around the Triton kernel's tiles of 64 rows, 128 codes and depths of 32 and 64
SHAPES = [(1, 1, 1), (0, 3, 4), (5, 7, 9), (3, 31, 130), (65, 65, 127), (4, 64, 129), (70, 96, 300), (2, 40, 16384)]


def inputs(shape, dtype, guided=True):
    rows, width, codes = shape
    cond = normals(rows, width, dtype=dtype)
    uncond = normals(rows, width, seed=1, dtype=dtype) if guided else None
    return cond, uncond, normals(codes, width, seed=2, dtype=dtype), normals(codes, seed=3, dtype=dtype)


def sample(cond, uncond, weight, bias, *, noise, backend=None, **settings):
    return ops.sample_tokens(cond, uncond, weight, bias, noise=noise, backend=backend, **{**SETTINGS, **settings})


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [True, False])
def test_the_head_by_hand(backend, dtype, guided):
    skip_unless_built(backend)
    (cond, uncond, weight, bias), u = inputs((6, 20, 33), dtype, guided), draws(6, 33)
    found = sample(cond, uncond, weight, bias, noise=u, backend=backend)
    logits = [None if h is None else h.double() @ weight.double().T + bias.double() for h in (cond, uncond)]
    ids, confidence = by_hand(*logits, u, **SETTINGS)
    assert found[0].tolist() == ids.tolist()
    assert torch.allclose(found[1].double(), confidence.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(backend, shape):
    skip_unless_built(backend)
    for dtype, guided, counted, tau in itertools.product(DTYPES, (True, False), (True, False), (0.0, 0.7)):
        tensors = inputs(shape, dtype, guided)
        noise = counters(shape[0]) if counted else draws(shape[0], shape[2], seed=4)
        got = sample(*tensors, noise=noise, backend=backend, tau=tau)
        hidden = rounded_hidden(*tensors[:2], SETTINGS["guidance"], torch.float64)
        check_head(got, hidden, *tensors[2:], noise, **(SETTINGS | {"tau": tau}))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("shape", [*SHAPES, (256, 1152, 16384)])
def test_float64_agrees_on_a_gpu(backend, shape):
    for dtype, guided, counted, tau in itertools.product(DTYPES, (True, False), (True, False), (0.0, 0.7)):
        tensors = inputs(shape, dtype, guided)
        noise = counters(shape[0]) if counted else draws(shape[0], shape[2], seed=4)
        on_gpu = (None if x is None else x.cuda() for x in tensors)
        got = sample(*on_gpu, noise=to(noise, "cuda"), backend=backend, tau=tau)
        rounding = torch.float64 if backend == "reference" else dtype
        hidden = rounded_hidden(*tensors[:2], SETTINGS["guidance"], rounding)
        check_head(got, hidden, *tensors[2:], noise, **(SETTINGS | {"tau": tau}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_draws_the_same_on_a_gpu(dtype):
    from dcar_fast.kernels import sample_tokens as kernels

    tensors = [x.cuda() for x in inputs((200, 200, 1000), dtype)]
    noise = to(counters(200), "cuda")
    drawn = {"uniforms": None, "seeds": noise.seeds, "tokens": noise.tokens, "step": noise.step}
    want = kernels.sample_tokens(*tensors, **SETTINGS, **drawn)
    ran = 0
    for config in kernels.table_for(dtype).candidates:
        try:
            got = kernels.sample_tokens(*tensors, **SETTINGS, **drawn, config=config)
        except Exception as error:
            if type(error).__name__ not in DOES_NOT_FIT:
                raise
            continue
        assert torch.equal(got[0], want[0]), config
        ran += 1
    assert ran


def test_blocks_of_rows_change_nothing(monkeypatch):
    skip_unless_built("native")
    tensors, noise = inputs((11, 20, 64), torch.float32), counters(11)
    want = sample(*tensors, noise=noise, backend="native")
    module = importlib.import_module("dcar_fast.ops.sample_tokens")  # dcar_fast.ops.sample_tokens is the function
    for logits in (1, 64, 200):
        monkeypatch.setattr(module, "NATIVE_LOGITS", logits)
        for draw in (noise, noise.uniform(64)):
            got = sample(*tensors, noise=draw, backend="native")
            assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], rtol=1e-6)


@pytest.mark.parametrize("backend", HERE)
def test_no_number_is_never_out_of_range(backend):
    skip_unless_built(backend)
    cond, uncond, weight, bias = inputs((6, 8, 50), torch.float32)
    cond[0, 0], cond[1], uncond[2, 3], cond[3, 1] = float("nan"), float("inf"), -float("inf"), 3e38
    weight[4, 2], bias[7], bias[9] = float("nan"), float("nan"), -float("inf")
    ids, confidence = sample(cond, uncond, weight, bias, noise=counters(6), backend=backend)
    assert ((ids >= 0) & (ids < 50)).all() and not confidence.isnan().any()
    assert not set(ids[4:].tolist()) & {4, 7, 9} and confidence[4:].isfinite().all()
    assert ids[0] == 0 and confidence[0] == -float("inf")  # its logits are NaN


@pytest.mark.parametrize("backend", HERE)
def test_equal_codes_give_the_lowest_id(backend):
    skip_unless_built(backend)
    cond, uncond, weight, bias = inputs((5, 12, 6), torch.float32)
    weight, bias = weight.repeat(60, 1), bias.repeat(60)
    got = sample(cond, uncond, weight, bias, noise=counters(5), tau=0.0, backend=backend)
    assert (got[0] < 6).all()


@pytest.mark.parametrize("backend", HERE)
def test_strides_and_types_do_not_matter(backend):
    skip_unless_built(backend)
    cond, uncond, weight, bias = inputs((5, 12, 30), torch.float32)
    noise = counters(5)
    want = sample(cond, uncond, weight, bias, noise=noise, backend=backend)
    twice = torch.stack([bias, bias], 1)[:, 0]
    strided = (cond.T.contiguous().T, torch.cat([uncond, cond], 1)[:, :12], weight.T.contiguous().T, twice)
    got = sample(*strided, noise=noise, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], rtol=1e-6)
    mixed = sample(cond.double(), uncond, weight.double(), bias, noise=noise, backend=backend)
    assert torch.equal(mixed[0], want[0]) and mixed[1].dtype == torch.float32


@pytest.mark.parametrize("backend", HERE)
def test_many_rows(backend):
    skip_unless_built(backend)
    tensors, noise = inputs((65_537, 2, 5), torch.float32), counters(65_537)
    hidden = rounded_hidden(*tensors[:2], SETTINGS["guidance"], torch.float64)
    check_head(sample(*tensors, noise=noise, backend=backend), hidden, *tensors[2:], noise, **SETTINGS)


def test_parameters_may_require_a_gradient():
    tensors = [x.requires_grad_() for x in inputs((2, 3, 4), torch.float32)]
    ids, confidence = sample(*tensors, noise=counters(2))
    assert not ids.requires_grad and not confidence.requires_grad


def test_opcheck():
    noise = counters(3)
    for guided, draw in ((True, (None, noise.seeds, noise.tokens, 2)), (False, (draws(3, 5), None, None, 0))):
        arguments = (*inputs((3, 4, 5), torch.float32, guided), *draw, 3.5, 0.8, 0.7, None)
        torch.library.opcheck(torch.ops.dcar_fast.sample_tokens.default, arguments)


def test_compiled_and_exported():
    tensors = inputs((4, 6, 30), torch.float32)

    def call(tensors, noise, tau):
        return sample(*tensors, noise=noise, tau=tau)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for step, tau in ((0, 0.7), (1, 0.5), (2, 0.0)):
        noise = counters(4, step)
        assert all(map(torch.equal, compiled(tensors, noise, tau), call(tensors, noise, tau)))

    class Module(torch.nn.Module):
        def forward(self, cond, uncond, weight, bias, seeds, tokens):
            return sample(cond, uncond, weight, bias, noise=TokenNoise(seeds, tokens, 2))

    noise = counters(4, 2)
    arguments = (*tensors, noise.seeds, noise.tokens)
    exported = torch.export.export(Module(), arguments)
    assert "dcar_fast.sample_tokens" in str(exported.graph)
    assert all(map(torch.equal, exported.module()(*arguments), call(tensors, noise, 0.7)))


COND, WEIGHT, BIAS = torch.zeros(2, 6), torch.zeros(9, 6), torch.zeros(9)


def _tokens(cond=COND, uncond=None, weight=WEIGHT, bias=BIAS, noise=None, **settings):
    sample(cond, uncond, weight, bias, noise=torch.zeros(2, 9) if noise is None else noise, **settings)


BAD = [
    ("uncond", lambda: _tokens(uncond=COND.int())),
    ("noise", lambda: _tokens(noise=torch.zeros(2, 6))),
    ("noise", lambda: _tokens(noise=7)),
    (
        "noise.tokens has values in -1",
        lambda: _tokens(noise=TokenNoise(torch.zeros(2).long(), -torch.ones(2).long(), 0)),
    ),
    ("weight", lambda: _tokens(weight=WEIGHT.T)),
    ("weight", lambda: _tokens(weight=WEIGHT[:0], bias=BIAS[:0])),
    ("weight", lambda: _tokens(weight=WEIGHT.to("meta"))),
    ("weight", lambda: _tokens(weight=WEIGHT.int())),
    ("bias", lambda: _tokens(bias=BIAS[1:])),
    ("bias", lambda: _tokens(bias=BIAS.bool())),
    ("tau", lambda: _tokens(tau=-1.0)),
    ("backend", lambda: _tokens(backend="cuda")),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("codes", [2, 5, 33, 65, 130, 1000])
@pytest.mark.parametrize("rows, width", [(1, 7), (1, 40), (3, 64), (17, 333)])
def test_equal_codes_tie_to_the_lowest(backend, codes, rows, width):
    """Wherever in the vocabulary they stand."""
    skip_unless_built(backend)
    cond, uncond = normals(rows, width), normals(rows, width, seed=1)
    weight, bias = normals(1, width, seed=2).repeat(codes, 1), torch.full((codes,), 0.3)
    for other in (None, uncond):
        ids, confidence = sample(cond, other, weight, bias, noise=draws(rows, codes), backend=backend, tau=0.0)
        assert ids.tolist() == [0] * rows and confidence.isfinite().all()
