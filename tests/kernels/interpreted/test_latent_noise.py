"""kernels/latent_noise.py in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dcar_fast.kernels import latent_noise as kernels
from tests.ops.test_latent_noise import check, rows_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


# around blocks of 256 counters, which are 4 channels of a row each
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (256, 4), (257, 3), (33, 32), (3, 2000), (0, 5)])
def test_float64_agrees(shape: tuple[int, int]) -> None:
    rows, channels = shape
    seeds, tokens = rows_of(rows)
    for step, initial in ((0, True), (0, False), (9, False), (2**32 - 1, False)):
        got = kernels.latent_noise(seeds, tokens, channels, step, initial=initial)
        check(got, seeds, tokens, channels, step, initial, 5)


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
def test_every_configuration_gives_the_same(config) -> None:
    seeds, tokens = rows_of(90)
    got = kernels.latent_noise(seeds, tokens, 30, 3, initial=False, config=config)
    assert torch.equal(got, kernels.latent_noise(seeds, tokens, 30, 3, initial=False))


def test_strides_do_not_matter() -> None:
    both = torch.stack(rows_of(20), 1)
    got = kernels.latent_noise(both[:, 0], both[:, 1], 6, 1, initial=False)
    check(got, both[:, 0], both[:, 1], 6, 1, False, 5)
