"""Shared by the tests of the sampling noise in other languages: Random123's known answers, and what to compare."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcar_fast.noise import philox4x32, words_to_uniform
from tests.tolerance import check_close

# counter, key, words: Random123's kat_vectors for philox4x32-10
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_seed(key: tuple[int, int]) -> int:
    """The int64 with these low and high words."""
    seed = key[0] | key[1] << 32
    return seed - 2**64 if seed >= 2**63 else seed


def arbitrary(count: int) -> tuple[Tensor, Tensor]:
    """Counters (count, 4) and keys (count, 2): int64 holding 32-bit words, the extremes among them."""
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (count, 4), generator=generator)
    keys = torch.randint(0, 2**32, (count, 2), generator=generator)
    counters[0], keys[0], counters[1], keys[1] = 0, 0, 2**32 - 1, 2**32 - 1
    return counters, keys


def reference_words(counters: Tensor, keys: Tensor) -> Tensor:
    return torch.stack(philox4x32(tuple(counters.T), tuple(keys.T)), dim=1)


def check_triton(draw, device: str) -> None:
    """``draw`` of philox_probe.py against the reference: words and uniforms exactly, what logarithms, sines and cosines
    go into by the tolerance rule."""
    for counter, key, answer in KNOWN_ANSWERS:
        seed, quad, token = (torch.tensor([v], device=device) for v in (as_seed(key), counter[0], counter[1]))
        assert draw(seed, quad, token, counter[2], counter[3])[0].tolist() == [list(answer)]

    counters, keys = arbitrary(4000)
    counters[:, 2], counters[:, 3] = 11, 3
    seeds = torch.tensor([as_seed(tuple(key)) for key in keys.tolist()])
    words, u, gumbel, z = (
        x.cpu() for x in draw(*(x.contiguous().to(device) for x in (seeds, counters[:, 0], counters[:, 1])), 11, 3)
    )
    assert torch.equal(words, reference_words(counters, keys))
    assert torch.equal(u, words_to_uniform(words))
    check_relative(gumbel, -(-u.double().log()).log(), -(-u.log()).log())
    check_close(z, box_muller(u), box_muller(u.double()), "normals")


def box_muller(u: Tensor) -> Tensor:
    """Normals (count, 4) from uniforms (count, 4), in their type."""
    radius, angle = torch.sqrt(-2.0 * u[:, ::2].log()), (2.0 * math.pi) * u[:, 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)


def check_relative(got: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The error relative to 1 + |truth| is at most twice that of PyTorch's float32 logarithms."""
    error, baseline = (((x.double() - truth).abs() / (1 + truth.abs())).max().item() for x in (got, plain))
    assert error <= 2 * baseline, (error, baseline)
