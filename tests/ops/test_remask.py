"""remask: counts, ranks, ties, NaN, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast import ops


def test_remask_counts_and_ranks():
    inf, nan = math.inf, math.nan
    ids = torch.arange(20).view(4, 5)
    confidence = torch.tensor([[3.0, 1.0, 2.0, 1.0, inf], [nan, -inf, 0.0, nan, 1.0], [1.0] * 5, [inf] * 5])
    masked = ops.remask(ids, confidence, torch.tensor([2, 3, 4, 0]), 99) == 99
    assert [row.nonzero().flatten().tolist() for row in masked] == [[1, 3], [0, 1, 3], [0, 1, 2, 3], []]
    assert torch.equal(ops.remask(ids, confidence, torch.tensor([5, 5, 5, 5]), 99), torch.full((4, 5), 99))
    assert ops.remask(ids[:0], confidence[:0], torch.zeros(0, dtype=torch.int64), 99).shape == (0, 5)
    swapped = ops.remask(ids.T.contiguous().T, confidence.T.contiguous().T, torch.tensor([2, 3, 4, 0]), 99)
    assert torch.equal(swapped == 99, masked)


IDS, CONFIDENCE, COUNTS = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.tensor([1, 4])

BAD = [
    ("ids", lambda: ops.remask(IDS.int(), CONFIDENCE, COUNTS, 9)),
    ("ids", lambda: ops.remask(IDS[0], CONFIDENCE, COUNTS, 9)),
    ("confidence", lambda: ops.remask(IDS, IDS, COUNTS, 9)),
    ("confidence", lambda: ops.remask(IDS, CONFIDENCE[:, 1:], COUNTS, 9)),
    ("num_masked", lambda: ops.remask(IDS, CONFIDENCE, COUNTS + 1, 9)),
    ("num_masked", lambda: ops.remask(IDS, CONFIDENCE, COUNTS - 2, 9)),
    ("num_masked", lambda: ops.remask(IDS, CONFIDENCE, COUNTS.int(), 9)),
    ("num_masked", lambda: ops.remask(IDS, CONFIDENCE, 2, 9)),
    ("mask_id", lambda: ops.remask(IDS, CONFIDENCE, COUNTS, 9.0)),
    ("backend", lambda: ops.remask(IDS, CONFIDENCE, COUNTS, 9, backend="fastest")),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()
