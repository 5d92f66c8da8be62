"""The end of an unmasking step in one launch: one program per image, no sort.

A row's keys stay in registers. Bisecting their values, which are integers, finds the largest one that is masked; prefix
sums number ties and positions. Sampled positions in another order come through memory: they are written to where they
belong and read again by the same program.
"""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox
from dcar_fast.kernels._sampling import COUNTER, NO_NOISE, UNIFORMS, recorded_gumbel
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant
from dcar_fast.kernels.remask import rank_key


def block(tokens: int) -> int:
    """A row is one block: its length, rounded up to a power of two."""
    return max(32, triton.next_power_of_2(tokens))


# Only the number of warps is free. From 1 to 4096 tokens the row fits into registers; beyond, it spills.
RULES = (
    Rule({"tokens": 256}, Config({}, 4)),
    Rule({"tokens": 1024}, Config({}, 8)),
    Rule({"tokens": 4096}, Config({}, 16)),
    Rule({}, Config({}, 32)),
)
TABLE = Table(
    "place_tokens",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(Config({}, warps) for warps in (1, 2, 4, 8, 16)),
    scaling=("tokens",),
)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
INFINITY = tl.constexpr(0x7F800000)  # its bits


@triton.jit
def lowest(key, there, k):
    """(threshold, ties): the k lowest of the keys that are there, 0 <= k, are those below the threshold and the first
    ``ties`` equal to it."""
    low = tl.min(tl.where(there, key, INFINITY), axis=0)
    high = tl.max(tl.where(there, key, -INFINITY - 1), axis=0)
    below = tl.zeros_like(low)  # keys < low
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        up_to = tl.sum((there & (key <= middle)).to(tl.int32), axis=0)
        exact = up_to == k
        below = tl.where(exact, tl.full([], -0x40000000, tl.int32), tl.where(up_to < k, up_to, below))
        low = tl.where(exact, middle, tl.where(up_to < k, middle + 1, low))
        high = tl.where(up_to < k, high, middle)
    return low, k - below


@triton.jit
def noisy(confidence, row, position, inside, uniforms, seeds, step, tokens, uniforms_row, tau, NOISE: tl.constexpr):
    """confidence + tau * gumbel, at most float32's largest number; NaN stays NaN."""
    if NOISE == COUNTER:
        seed = tl.load(seeds + row)
        word, _, _, _ = philox.philox(seed, tl.zeros_like(position), position, step, philox.STREAM_CONFIDENCE)
        value = confidence + tau * philox.gumbel(philox.uniform(word))
    else:
        u = tl.load(uniforms + row * uniforms_row + position, mask=inside, other=0.5)
        value = confidence + tau * recorded_gumbel(u)
    return tl.where(value > LARGEST, LARGEST, value)


@triton.jit(do_not_specialize=["step", "sampled", "next_open"])
def place_tokens_kernel(
    ids,  # (B, N) int64
    rows,  # (B, n) int64, not read unless SCATTERED
    chosen,  # (B, n) int64
    confidence,  # (B, n) float32
    num_masked,  # (B,) int64, not read if NOISE is NO_NOISE
    uniforms,  # (B, N) float32, not read unless NOISE is UNIFORMS
    seeds,  # (B,) int64, not read unless NOISE is COUNTER
    values,  # (B, N) float32, contiguous: scratch, not touched unless SCATTERED
    new_ids,  # (B, N) int64, contiguous
    next_rows,  # (B, next_open) int64, contiguous
    mask_id,
    tokens,
    sampled,
    next_open,
    step,
    tau,
    ids_row,
    rows_row,
    chosen_row,
    confidence_row,
    num_masked_row,
    uniforms_row,
    NOISE: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < tokens
    ids += row * ids_row
    chosen += row * chosen_row
    confidence += row * confidence_row
    values += row * tokens
    new_ids += row * tokens

    token = tl.load(ids + position, mask=inside, other=0)
    is_open = inside & (token == mask_id)
    if SCATTERED:
        tl.store(new_ids + position, token, mask=inside)
        if NOISE != NO_NOISE:
            tl.store(values + position, tl.full((BLOCK,), float("inf"), tl.float32), mask=inside)
        tl.debug_barrier()  # what one thread writes another one may overwrite, and then read
        given = position < sampled
        target = tl.load(rows + row * rows_row + position, mask=given, other=0)
        given &= (target >= 0) & (target < tokens)  # rows that are wrong write nothing, rather than anywhere
        target = target.to(tl.int32)
        given &= tl.load(ids + target, mask=given, other=0) == mask_id
        tl.store(new_ids + target, tl.load(chosen + position, mask=given, other=0), mask=given)
        if NOISE != NO_NOISE:
            value = tl.load(confidence + position, mask=given, other=0.0)
            value = noisy(value, row, target, given, uniforms, seeds, step, tokens, uniforms_row, tau, NOISE)
            tl.store(values + target, value, mask=given)
        tl.debug_barrier()
        token = tl.load(new_ids + position, mask=inside, other=0)
        if NOISE != NO_NOISE:
            value = tl.load(values + position, mask=inside, other=0.0)
    else:
        token = tl.where(is_open, tl.load(chosen + position, mask=is_open, other=0), token)
        if NOISE != NO_NOISE:
            value = tl.load(confidence + position, mask=is_open, other=0.0)
            value = noisy(value, row, position, is_open, uniforms, seeds, step, tokens, uniforms_row, tau, NOISE)
            value = tl.where(is_open, value, float("inf"))

    if NOISE != NO_NOISE:
        # A k below 0 masks nothing and a k beyond N everything: the host does not look at it.
        k = tl.load(num_masked + row * num_masked_row)
        k = tl.minimum(tl.maximum(k, 0), tokens).to(tl.int32)
        key = rank_key(value.to(tl.int32, bitcast=True), INFINITY)
        threshold, ties = lowest(key, inside, k)
        tied = inside & (key == threshold)
        masked = inside & ((key < threshold) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= ties)))
        token = tl.where(masked, mask_id, token)
    tl.store(new_ids + position, token, mask=inside)

    looks = inside & (token == mask_id)
    up_to = tl.cumsum(looks.to(tl.int32), axis=0)
    place = tl.where(looks, up_to - 1, tl.sum(looks.to(tl.int32), axis=0) + position - up_to)
    tl.store(next_rows + row * next_open + place, position.to(tl.int64), mask=inside & (place < next_open))


def place_tokens(
    ids: torch.Tensor,
    rows: torch.Tensor | None,
    sampled: torch.Tensor,
    confidence: torch.Tensor,
    num_masked: torch.Tensor,
    mask_id: int,
    *,
    tau: float,
    uniforms: torch.Tensor | None,
    seeds: torch.Tensor | None,
    step: int,
    next_open: int,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """new ids (B, N) and next rows (B, next_open), int64. Noise: ``uniforms`` (B, N) float32, or ``seeds`` (B,) int64
    and ``step``, or neither. Rows may lie apart. One launch on the current device; formula and checks:
    ``reference/place_tokens.py``, ``ops/place_tokens.py``. Rows of more than 4096 tokens are slow, of more than 2^20
    beyond Triton's blocks.
    """
    batch, tokens = ids.shape
    new_ids = torch.empty(batch, tokens, dtype=torch.int64, device=ids.device)
    next_rows = torch.empty(batch, next_open, dtype=torch.int64, device=ids.device)
    if new_ids.numel() == 0:
        return new_ids, next_rows
    noise = COUNTER if seeds is not None else NO_NOISE if uniforms is None else UNIFORMS
    scattered = rows is not None
    config = config or TABLE.pick(ids.device, tokens=tokens)
    ids, chosen, confidence = (_rowwise(x) for x in (ids, sampled, confidence))
    rows = _rowwise(rows) if scattered else ids  # what stands in is not read
    uniforms = confidence if uniforms is None else _rowwise(uniforms)
    scratch = scattered and noise != NO_NOISE
    values = torch.empty(batch, tokens, dtype=torch.float32, device=ids.device) if scratch else confidence
    place_tokens_kernel[(batch,)](
        ids,
        rows,
        chosen,
        confidence,
        num_masked,
        uniforms,
        num_masked if seeds is None else seeds.contiguous(),
        values,
        new_ids,
        next_rows,
        mask_id,
        tokens,
        chosen.shape[1],
        next_open,
        step,
        float(tau),
        ids.stride(0),
        rows.stride(0),
        chosen.stride(0),
        confidence.stride(0),
        num_masked.stride(0),
        uniforms.stride(0),
        NOISE=noise.value,
        SCATTERED=scattered,
        BLOCK=block(tokens),
        **config.launch,
    )
    return new_ids, next_rows


def _rowwise(x: torch.Tensor) -> torch.Tensor:
    """Copied unless the elements of a row lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def cases() -> list[Case]:
    """The second step of one image and of sixteen: the token grids at 256, 512 and 1024 px, most positions open."""

    def case(batch: int, tokens: int) -> Case:
        def prepare(device: torch.device):
            ids = torch.full((batch, tokens), 16384, device=device)
            ids[:, ::8] = torch.randint(0, 16384, (batch, len(range(0, tokens, 8))), device=device)
            rows = (ids != 16384).byte().argsort(dim=1, stable=True)[:, : tokens - tokens // 8]
            sampled, confidence = torch.randint(0, 16384, rows.shape, device=device), torch.randn(rows.shape)
            counts = torch.full((batch,), tokens * 3 // 4, device=device)
            noise = {"uniforms": None, "seeds": torch.arange(batch, device=device), "step": 1}
            inputs = (ids, rows, sampled, confidence.to(device), counts, 16384)
            return lambda config: place_tokens(*inputs, tau=1.0, **noise, next_open=tokens * 3 // 4, config=config)

        return Case(f"fp32 {batch}x{tokens}", TABLE, {"tokens": tokens}, prepare)

    return [case(batch, tokens) for batch in (1, 16) for tokens in (64, 256, 1024)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """Rows of 256 with every noise, of all and of some positions; and longer rows."""
    noises = {"counter": COUNTER, "recorded": UNIFORMS, "last": NO_NOISE}
    kinds = [(256, name, scattered) for name in noises for scattered in (False, True)]
    kinds += [(tokens, "counter", True) for tokens in (64, 1024, 4096)]
    pointers = dict.fromkeys(("ids", "rows", "chosen", "num_masked", "seeds", "new_ids", "next_rows"), "*i64")
    sizes = ("tokens", "sampled", "next_open", "step", "mask_id")
    strides = ("ids_row", "rows_row", "chosen_row", "confidence_row", "uniforms_row")
    return [
        Variant(
            name="place_tokens",
            dtype="fp32",
            shape=f"N={tokens} {name}{' scattered' if scattered else ''}",
            config=config,
            kernel=place_tokens_kernel,
            signature=pointers
            | dict.fromkeys(("confidence", "uniforms", "values"), "*fp32")
            | dict.fromkeys((*sizes, *strides), "i32")
            | {"tau": "fp32"},
            constexprs={
                "NOISE": noises[name].value,
                "SCATTERED": scattered,
                "BLOCK": block(tokens),
                "num_masked_row": 1,
            },
            multiples_of_16=("tokens", "mask_id", *strides),
        )
        for tokens, name, scattered in kinds
        for config in TABLE.configs(capability, every, tokens=tokens)
    ]
