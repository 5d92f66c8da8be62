"""kernels/sample_tokens.py in Triton's interpreter. Float32 and float16: the interpreter's bfloat16 is wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from dcar_fast.kernels import sample_tokens as kernels
from dcar_fast.noise import TokenNoise
from tests.ops.sampling_cases import SETTINGS, check_head, counters, draws, normals, rounded_hidden

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16]


def inputs(shape, dtype, guided=True):
    rows, width, codes = shape
    cond = normals(rows, width, dtype=dtype)
    uncond = normals(rows, width, seed=1, dtype=dtype) if guided else None
    return cond, uncond, normals(codes, width, seed=2, dtype=dtype), normals(codes, seed=3, dtype=dtype)


def sample(tensors, noise, config=None, **settings):
    if isinstance(noise, TokenNoise):
        drawn = {"uniforms": None, "seeds": noise.seeds, "tokens": noise.tokens, "step": noise.step}
    else:
        drawn = {"uniforms": noise, "seeds": None, "tokens": None, "step": 0}
    return kernels.sample_tokens(*tensors, **{**SETTINGS, **settings}, **drawn, config=config)


def check(got, tensors, noise, tau=SETTINGS["tau"]):
    hidden = rounded_hidden(*tensors[:2], SETTINGS["guidance"], tensors[2].dtype)
    check_head(got, hidden, *tensors[2:], noise, **(SETTINGS | {"tau": tau}))


# around tiles of 64 rows, 128 codes and depths of 32 and 64
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 4), (5, 7, 9), (3, 31, 130), (65, 65, 127), (4, 64, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_agrees(shape, dtype):
    for guided, counted, tau in itertools.product((True, False), (True, False), (0.0, 0.7)):
        tensors = inputs(shape, dtype, guided)
        noise = counters(shape[0]) if counted else draws(shape[0], shape[2], seed=4)
        check(sample(tensors, noise, tau=tau), tensors, noise, tau)


CONFIGS = [(dtype, config) for dtype in DTYPES for config in kernels.table_for(dtype).candidates]


@pytest.mark.parametrize("dtype, config", CONFIGS, ids=str)
def test_every_configuration_draws_the_same(dtype, config):
    tensors, noise = inputs((34, 50, 140), dtype), counters(34)
    got = sample(tensors, noise, config)
    check(got, tensors, noise)
    assert torch.equal(got[0], sample(tensors, noise)[0])


def test_more_tiles_of_rows_than_a_group_has():
    narrow = kernels.tile(32, 64, 32, 4, 2)
    tensors, noise = inputs((32 * 16 + 40, 3, 100), torch.float32), counters(32 * 16 + 40)
    check(sample(tensors, noise, narrow), tensors, noise)


def test_wide_hidden_states_are_guided_in_blocks():
    for dtype in DTYPES:
        tensors, noise = inputs((3, 2100, 10), dtype), counters(3)
        check(sample(tensors, noise), tensors, noise)


@pytest.mark.parametrize("scale", [6e4, 1e-4])
def test_float16_keeps_hidden_states_that_leave_its_range(scale):
    cond, uncond, weight, bias = inputs((4, 40, 50), torch.float16)
    cond, uncond = ((x.float() / x.abs().max() * scale).half() for x in (cond, uncond))
    tensors, noise = (cond, -uncond, weight, bias), counters(4)
    got = sample(tensors, noise)
    assert got[1].isfinite().all()
    check(got, tensors, noise)


def test_equal_codes_give_the_lowest_id():
    cond, uncond, weight, bias = inputs((5, 12, 6), torch.float32)
    ids, _ = sample((cond, uncond, weight.repeat(60, 1), bias.repeat(60)), counters(5), tau=0.0)
    assert (ids < 6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_is_never_out_of_range(dtype):
    cond, uncond, weight, bias = inputs((6, 8, 300), dtype)
    cond[0, 0], cond[1], uncond[2, 3] = float("nan"), float("inf"), -float("inf")
    weight[4, 2], bias[7], bias[9] = float("nan"), float("nan"), -float("inf")
    ids, confidence = sample((cond, uncond, weight, bias), counters(6))
    assert ((ids >= 0) & (ids < 300)).all() and not confidence.isnan().any()
    assert not set(ids[3:].tolist()) & {4, 7, 9} and confidence[3:].isfinite().all()
    assert ids[0] == 0 and confidence[0] == -float("inf")  # its logits are NaN


def test_strides_and_mixed_types_do_not_matter():
    cond, uncond, weight, bias = inputs((5, 12, 30), torch.float32)
    noise, twice = counters(5), torch.stack([bias, bias], 1)[:, 0]
    want = sample((cond, uncond, weight, bias), noise)
    strided = (cond.T.contiguous().T, torch.cat([uncond, cond], 1)[:, :12], weight.T.contiguous().T, twice)
    assert all(map(torch.equal, sample(strided, noise), want))
    padded = (cond, uncond, torch.cat([weight, weight], 1)[:, :12], bias)
    assert all(map(torch.equal, sample(padded, noise), want))
    mixed = (cond.half(), uncond, weight, bias.half())
    check(sample(mixed, noise), mixed, noise)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_type_does_not_matter(dtype, with_default_dtype):
    tensors, noise = inputs((9, 20, 300), dtype), counters(9)
    want = sample(tensors, noise)
    got = with_default_dtype(lambda: sample(tensors, noise))
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(got, want, strict=True))
