"""cross_attention: the formula spelled out, ignored keys, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast import ops
from tests.ops.sampling_cases import normals


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("keys, width", [(1, 72), (63, 8), (65, 72), (300, 32)])
def test_cross_attention_is_the_formula(keys, width, dtype, bound):
    lengths = torch.tensor([keys, max(1, keys // 2), 0])
    q = normals(3, 4, 2, width, dtype=dtype)
    k, v = (normals(3, keys, 2, width, seed=s, dtype=dtype) for s in (1, 2))
    k[1, lengths[1] :], v[1, lengths[1] :], v[2] = math.nan, math.nan, math.inf  # never looked at
    out = ops.cross_attention(q, k, v, lengths)
    assert out.dtype == dtype and torch.count_nonzero(out[2]) == 0
    for b in range(2):
        for h in range(2):
            n = int(lengths[b])
            scores = q[b, :, h].double() @ k[b, :n, h].double().T / math.sqrt(width)
            expected = scores.softmax(-1) @ v[b, :n, h].double()
            assert (out[b, :, h].double() - expected).abs().max() < bound


Q, K = torch.zeros(2, 3, 2, 8), torch.zeros(2, 5, 2, 8)
LENGTHS = torch.tensor([5, 1])

BAD = [
    ("q", lambda: ops.cross_attention(Q.long(), K, K, LENGTHS)),
    ("q", lambda: ops.cross_attention(Q[0], K, K, LENGTHS)),
    ("k", lambda: ops.cross_attention(Q, K[..., :4], K, LENGTHS)),
    ("k", lambda: ops.cross_attention(Q, K.half(), K, LENGTHS)),
    ("v", lambda: ops.cross_attention(Q, K, K[:, 1:], LENGTHS)),
    ("lengths", lambda: ops.cross_attention(Q, K, K, LENGTHS + 1)),
    ("lengths", lambda: ops.cross_attention(Q, K, K, LENGTHS - 2)),
    ("lengths", lambda: ops.cross_attention(Q, K, K, LENGTHS.float())),
    ("backend", lambda: ops.cross_attention(Q, K, K, LENGTHS, backend="triton")),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()
