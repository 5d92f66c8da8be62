"""Shared by the tests of place_tokens: inputs, and the judgement from Python's sort in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dcar_fast.noise import ConfidenceNoise, CounterNoise
from tests.tolerance import HALF_ULP

MASK = 16384
LARGEST = torch.finfo(torch.float32).max
INF, NAN = math.inf, math.nan
SEEDS = (0, 2**63 - 1, 5, 2**32, 2**32 - 1, 0x0123456789ABCDEF)
SPECIAL = [NAN, -INF, INF, 0.0, -0.0, 1.0, -1.0, LARGEST, -LARGEST, 1e-45, NAN, 1.0]


class Case(NamedTuple):
    """The arguments of place_tokens, without ``backend``."""

    ids: Tensor
    rows: Tensor | None
    sampled: Tensor
    confidence: Tensor
    num_masked: Tensor
    tau: float
    noise: Tensor | ConfidenceNoise | None
    next_open: int

    def run(self, place, device: str = "cpu", **how):
        """``place_tokens`` on ``device``; the results on the CPU."""
        move = [x if x is None else x.to(device) for x in self[:5]]
        noise = self.noise
        if isinstance(noise, ConfidenceNoise):
            noise = ConfidenceNoise(noise.seeds.to(device), noise.step)
        elif noise is not None:
            noise = noise.to(device)
        results = place(*move, MASK, tau=self.tau, noise=noise, next_open=self.next_open, **how)
        return tuple(result.cpu() for result in results)


def make(batch: int, tokens: int, kind: str, *, scattered: bool, noise: str, tau: float = 0.7, seed: int = 0) -> Case:
    """``kind`` of confidence: "random", "ties" or "special"; ``noise``: "counter", "recorded" or "last"."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    ids = torch.randint(0, MASK, (batch, tokens), generator=generator)
    ids[torch.rand(batch, tokens, generator=generator) < 0.7] = MASK
    rows, given = None, tokens
    if scattered:  # in no order, some open positions missing, some closed ones named
        given = (3 * tokens + 3) // 4
        rows = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])[:, :given]
    confidence = torch.randn(batch, given, generator=generator)
    if kind == "ties":
        confidence = torch.randint(-2, 3, (batch, given), generator=generator).float()
    if kind == "special":
        confidence = torch.tensor(SPECIAL).repeat(batch, given // len(SPECIAL) + 1)[:, :given].clone()
    counts = torch.randint(0, tokens + 1, (batch,), generator=generator)
    counts[:3] = torch.tensor([tokens // 2, tokens, 0])[:batch]
    drawn: Tensor | ConfidenceNoise | None = None
    if noise == "recorded":
        drawn = torch.rand(batch, tokens, generator=generator)
        drawn[:, ::5], drawn[:, 1::7] = 0.0, 1.0
    if noise == "counter":
        drawn = ConfidenceNoise(torch.tensor(SEEDS).repeat(batch // len(SEEDS) + 1)[:batch], 3)
    sampled = torch.randint(0, MASK, (batch, given), generator=generator)
    next_open = int(torch.randint(0, tokens + 1, (), generator=generator))
    return Case(ids, rows, sampled, confidence, counts, tau, drawn, next_open)


def cases(sizes: tuple[int, ...]) -> Iterator[Case]:
    for tokens in sizes:
        for scattered in (False, True):
            for noise in ("counter", "recorded", "last"):
                for kind, tau in (("random", 0.7), ("ties", 0.0), ("special", 0.0), ("special", 1.5)):
                    yield make(4, tokens, kind, scattered=scattered, noise=noise, tau=tau)


def uniforms(noise: Tensor | ConfidenceNoise, tokens: int) -> Tensor:
    if not isinstance(noise, ConfidenceNoise):
        return noise
    seeds = noise.seeds.tolist()
    return CounterNoise(seeds, num_tokens=tokens, codebook_size=1, latent_channels=1).confidence(noise.step)


def check(got: tuple[Tensor, Tensor], case: Case) -> None:
    """Exactly what Python's sort in float64 says; but with noise, which is rounded, positions whose scores are closer
    to the cut than rounding may be on either side, as many as there must be."""
    new_ids, next_rows = got
    batch, tokens = case.ids.shape
    assert (new_ids.shape, next_rows.shape) == ((batch, tokens), (batch, case.next_open))
    assert new_ids.dtype == next_rows.dtype == torch.int64 and new_ids.is_contiguous() and next_rows.is_contiguous()
    u = None if case.noise is None else uniforms(case.noise, tokens).double().tolist()
    for row in range(batch):
        values, placed = [INF] * tokens, case.ids[row].tolist()
        targets = range(tokens) if case.rows is None else case.rows[row].tolist()
        bound = 0.0
        for i, position in enumerate(targets):
            if placed[position] != MASK:
                continue
            placed[position] = case.sampled[row, i].item()
            confidence = case.confidence[row, i].item()
            if u is not None:
                gumbel = -math.log(max(-math.log(max(u[row][position], 1e-20)), 1e-20))
                score = min(confidence + case.tau * gumbel, LARGEST) if confidence == confidence else NAN
                values[position] = score
                if case.tau and math.isfinite(score) and abs(score) < 1e30:
                    bound = max(bound, 8 * HALF_ULP * (abs(confidence) + case.tau * (abs(gumbel) + 2)))
        want, got_row = placed, new_ids[row].tolist()
        if u is not None:
            k = case.num_masked[row].item()
            order = sorted(
                range(tokens), key=lambda i: (values[i] == values[i], values[i] if values[i] == values[i] else 0, i)
            )
            chosen = set(order[:k])
            masked = {i for i in range(tokens) if got_row[i] == MASK and placed[i] != MASK}
            open_still = {i for i in range(tokens) if placed[i] == MASK}
            if masked != chosen - open_still:
                cut = values[order[k - 1]]
                swapped = masked ^ (chosen - open_still)
                assert all(abs(values[i] - cut) <= bound for i in swapped), (row, swapped)
                assert len(masked) == len(chosen - open_still)
            want = [MASK if i in masked | open_still else placed[i] for i in range(tokens)]
        assert got_row == want, row
        looks = [i for i in range(tokens) if got_row[i] == MASK] + [i for i in range(tokens) if got_row[i] != MASK]
        assert next_rows[row].tolist() == looks[: case.next_open], row
