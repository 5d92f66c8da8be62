"""Shared by the tests of the sampling ops: settings, draws, the formula by hand and in float64, and the judgement."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops import _native
from tests.tolerance import HALF_ULP, check_choices

SETTINGS = {"guidance": 3.5, "softmax_temperature": 0.8, "tau": 0.7}
CPU = torch.device("cpu")
HERE = ["reference", "native", None]
GPU = ["reference", "triton", None]
SEEDS = (0, 2**63 - 1, 5, 2**32, 2**32 - 1, 0x0123456789ABCDEF)


def skip_unless_built(backend: str | None) -> None:
    if backend == "native" and not (usable := _native.cpu_usable(CPU)).ok:
        pytest.skip(usable.reason)


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counters(rows: int, step: int = 3) -> TokenNoise:
    """Counter noise for rows of several images, the seeds' extremes among them, in no order."""
    seeds = torch.tensor(SEEDS).repeat(-(-rows // len(SEEDS)))[:rows]
    return TokenNoise(seeds, torch.arange(rows) * 37 % 1024, step)


def to(noise: Tensor | TokenNoise, device: str) -> Tensor | TokenNoise:
    if isinstance(noise, TokenNoise):
        return TokenNoise(noise.seeds.to(device), noise.tokens.to(device), noise.step)
    return noise.to(device)


def by_hand(cond, uncond, u, guidance, softmax_temperature, tau):
    """One row at a time in Python floats."""
    ids, confidences = [], []
    for row in range(len(cond)):
        best, best_id, best_logit = -math.inf, 0, -math.inf
        for v in range(cond.shape[1]):
            c = cond[row, v].item()
            logit = c if uncond is None else c + guidance * (c - uncond[row, v].item())
            logit = -math.inf if math.isnan(logit) else logit / softmax_temperature
            gumbel = -math.log(max(-math.log(max(u[row, v].item(), 1e-20)), 1e-20))
            if logit + tau * gumbel > best:
                best, best_id, best_logit = logit + tau * gumbel, v, logit
        ids.append(best_id)
        confidences.append(best_logit)
    return torch.tensor(ids), torch.tensor(confidences)


def annealed(cond: Tensor, uncond: Tensor | None, guidance: float, softmax_temperature: float, dtype) -> Tensor:
    """The logits (R, V) before the noise, computed in ``dtype``, from finite ones."""
    logits = cond.to(dtype)
    if uncond is not None:
        logits = logits + guidance * (logits - uncond.to(dtype))
    return logits / softmax_temperature


def check_sample(
    got: tuple[Tensor, Tensor],
    logits: Tensor,
    plain: Tensor,
    noise: Tensor | TokenNoise,
    tau: float,
    rounding: float,
    accumulation: float = 0.0,
) -> None:
    """``got`` against float64 ``logits`` (R, V) with float64 noise: ids within rounding, confidences by the tolerance
    rule at the chosen ids. ``plain``: the logits as PyTorch computes them in float32. ``rounding``: how far a logit may
    be off. ``accumulation``: by how much products on tensor cores may be further off than PyTorch's."""
    ids, confidence = (x.cpu() for x in got)
    u = (noise.uniform(logits.shape[1]) if isinstance(noise, TokenNoise) else noise).double()
    gumbel = -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    assert confidence.dtype == torch.float32 and confidence.shape == ids.shape == logits.shape[:1]
    if not len(ids):
        return
    noise_rounding = 16 * HALF_ULP * tau * gumbel.abs().max().item()
    check_choices(ids, logits + tau * gumbel, 2 * (rounding + noise_rounding))
    # of all logits, and no less than a rounding: the few that are chosen may happen to be exact
    half_ulp = HALF_ULP * logits.abs().max().item()
    baseline = max((plain.double() - logits).abs().max().item(), half_ulp)
    error = (confidence.double() - logits.gather(1, ids[:, None])[:, 0]).abs().max().item()
    assert error <= 2 * baseline + half_ulp + accumulation, f"confidence: error {error:.3g}, plain {baseline:.3g}"


def rounded_hidden(cond: Tensor, uncond: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    """The guided hidden states as float64, rounded as a head of this type multiplies them: float16 within each row's
    own power of two."""
    hidden = cond.float()
    if uncond is not None:
        hidden = hidden + guidance * (hidden - uncond.float())
    if dtype != torch.float16:
        return hidden.to(dtype).double()
    scale = torch.ldexp(torch.ones(len(hidden), 1), hidden.abs().amax(1, keepdim=True).frexp().exponent - 1)
    return (hidden / scale).half().double() * scale


def check_head(
    got: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor, bias: Tensor, noise: Tensor | TokenNoise, **settings
) -> None:
    """``got`` of a head against float64 on the (rounded) guided hidden states ``hidden`` (R, D) float64."""
    temperature, tau = settings["softmax_temperature"], settings["tau"]
    weight16 = weight.dtype.itemsize == 2
    weight, bias = weight.double(), bias.double()
    logits = (hidden @ weight.T + bias) / temperature
    plain = (hidden.float() @ weight.float().T + bias.float()) / temperature
    magnitude = (hidden.abs() @ weight.abs().T + bias.abs()).max().item() if hidden.numel() else 0.0
    rounding = (hidden.shape[1] + 8) * HALF_ULP * magnitude / temperature
    # Tensor cores cut their float32 sums off after every 8 products (sm_80; 16 later on) where others round to nearest:
    # half a unit each time on average, always towards zero.
    cut_off = got[0].is_cuda and weight16
    accumulation = hidden.shape[1] / 8 * HALF_ULP * logits.abs().max().item() if cut_off and logits.numel() else 0.0
    check_sample(got, logits, plain, noise, tau, rounding, accumulation)


def chi_square(ids: Tensor, logits: Tensor) -> float:
    """Of the frequencies of ``ids`` against softmax(``logits``); V - 1 degrees of freedom."""
    expected = logits.double().softmax(0) * len(ids)
    found = torch.bincount(ids, minlength=len(logits)).double()
    return ((found - expected).square() / expected).sum().item()
