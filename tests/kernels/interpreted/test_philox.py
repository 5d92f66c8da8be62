"""kernels/philox.py in Triton's interpreter: the reference's words, and logarithms worth float32."""

from __future__ import annotations

import torch

from tests.ops.philox_cases import check_relative, check_triton
from tests.ops.philox_probe import draw, gumbel


def test_words_uniforms_and_normals() -> None:
    check_triton(draw, "cpu")


def test_gumbel_over_the_whole_range() -> None:
    """All uniforms next to 0 and 1, where one logarithm is close to zero, and a sample of the rest."""
    steps = torch.cat([torch.arange(5000), torch.arange(0, 2**23, 997), 2**23 - 1 - torch.arange(5000)])
    u = (steps.float() + 0.5) * 2.0**-23
    check_relative(gumbel(u), -(-u.double().log()).log(), -(-u.log()).log())
