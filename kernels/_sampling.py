"""What the two sampling kernels share: the score of a logit, the best of a block, and the best of the splits."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox
from dcar_fast.kernels.configs import Config
from dcar_fast.kernels.offline import Variant

NO_NOISE = tl.constexpr(0)  # tau = 0
COUNTER = tl.constexpr(1)  # Philox, from seeds, tokens and step
UNIFORMS = tl.constexpr(2)  # recorded uniforms, which may be exactly 0 or 1
NOWHERE = tl.constexpr(2**31 - 1)  # larger than every id

BEST_OF_SPLITS = Config({"BLOCK_ROWS": 8, "BLOCK_SPLITS": 64}, 4)  # too small a kernel for tuning to matter


@triton.jit
def without_nan(x):
    return tl.where(x != x, -float("inf"), x)


@triton.jit
def annealed(logit, softmax_temperature):
    """logit / softmax_temperature as PyTorch divides; NaN counts as -inf."""
    return without_nan(tl.div_rn(logit, tl.zeros_like(logit) + softmax_temperature))


@triton.jit
def recorded_gumbel(u):
    """-log(-log u) with the reference's clamps at 1e-20."""
    u = tl.where(u < 1e-20, 1e-20, u)
    exponential = -philox.log_normal_number(u)
    return -philox.log_normal_number(tl.where(exponential < 1e-20, 1e-20, exponential))


@triton.jit
def interleave4(a, b, c, d):
    """The words of each quad side by side: element 4 q + i of the last dimension is word i of quad q."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def best_of(score, logit, column):
    """Largest score along the last dimension, its column (the lowest on ties) and its logit."""
    best = tl.max(score, axis=-1, keep_dims=True)
    index = tl.min(tl.where(score == best, column, NOWHERE), axis=-1, keep_dims=True)
    chosen = tl.max(tl.where(column == index, logit, -float("inf")), axis=-1, keep_dims=True)
    return best, index, chosen


@triton.jit
def best_of_splits_kernel(
    scores,  # (R, S) float32
    ids,  # (R, S) int32
    logits,  # (R, S) float32
    out_ids,  # (R,) int64
    out_confidence,  # (R,) float32
    rows,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    live = row < rows
    best = tl.full((BLOCK_ROWS, 1), -float("inf"), tl.float32)
    index = tl.full((BLOCK_ROWS, 1), NOWHERE, tl.int32)
    chosen = tl.full((BLOCK_ROWS, 1), -float("inf"), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)[None, :]
        place = row.to(tl.int64) * splits + split
        inside = live & (split < splits)
        score = tl.load(scores + place, mask=inside, other=-float("inf"))
        column = tl.load(ids + place, mask=inside, other=NOWHERE)
        logit = tl.load(logits + place, mask=inside, other=-float("inf"))
        block_best, block_index, block_chosen = best_of(score, logit, column)
        wins = (block_best > best) | ((block_best == best) & (block_index < index))
        best = tl.where(wins, block_best, best)
        index = tl.where(wins, block_index, index)
        chosen = tl.where(wins, block_chosen, chosen)
    # without any score above -inf all splits tie, and the id is the first split's: it must be 0
    chosen = tl.where(best == -float("inf"), -float("inf"), chosen)
    index = tl.where(best == -float("inf"), 0, index)
    tl.store(out_ids + row, index.to(tl.int64), mask=live)
    tl.store(out_confidence + row, chosen, mask=live)


def noise_kind(uniforms: torch.Tensor | None, tau: float) -> int:
    """The kernels' ``NOISE``: at tau = 0 none is drawn or read."""
    return (NO_NOISE if tau == 0 else COUNTER if uniforms is None else UNIFORMS).value


def noise_arguments(
    uniforms: torch.Tensor | None, seeds: torch.Tensor | None, tokens: torch.Tensor | None, other: torch.Tensor
) -> list[torch.Tensor]:
    """Uniforms, seeds and tokens for a kernel, contiguous; ``other`` stands in for what is not there, nor read."""
    return [other if x is None else x.contiguous() for x in (uniforms, seeds, tokens)]


class Splits:
    """Where the splits of the vocabulary leave their best (score, id, logit), and the kernel that takes the best."""

    def __init__(self, rows: int, splits: int, device: torch.device) -> None:
        self.scores, self.logits = (torch.empty(rows, splits, dtype=torch.float32, device=device) for _ in range(2))
        self.ids = torch.empty(rows, splits, dtype=torch.int32, device=device)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (R,) int64 and confidence (R,) float32."""
        rows, splits = self.scores.shape
        ids = torch.empty(rows, dtype=torch.int64, device=self.ids.device)
        confidence = torch.empty(rows, dtype=torch.float32, device=self.ids.device)
        if not rows:
            return ids, confidence
        best_of_splits_kernel[(triton.cdiv(rows, BEST_OF_SPLITS.blocks["BLOCK_ROWS"]),)](
            self.scores, self.ids, self.logits, ids, confidence, rows, splits, **BEST_OF_SPLITS.launch
        )
        return ids, confidence


def best_of_splits_variant(op: str) -> Variant:
    """The kernel of :meth:`Splits.best` for the offline compiler."""
    return Variant(
        name=f"{op}.best_of_splits",
        dtype="fp32",
        shape="any",
        config=BEST_OF_SPLITS,
        kernel=best_of_splits_kernel,
        signature={
            "scores": "*fp32",
            "ids": "*i32",
            "logits": "*fp32",
            "out_ids": "*i64",
            "out_confidence": "*fp32",
            "rows": "i32",
            "splits": "i32",
        },
        constexprs={},
    )
