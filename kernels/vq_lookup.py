"""Nearest code of a codebook by cosine, in three launches: prepare, scan, finish.

Which of two codes is nearer may depend on the last bits of their cosines, so the products need float32's precision: one
product in TF32 or bfloat16 finds other codes. Here every normalised number, times 2048, is the sum of two float16
numbers, 22 bits together, and a cosine is three float16 products summed in float32: the precision of Triton's "tf32x3"
at twice its rate, in half the shared memory. Scaling keeps the lower part out of float16's subnormals: what is lost is
at most 2^-22 of a number, or 2^-36.

``prepare`` splits rows and codes once. Inside the scan every row tile would normalise and split all codes again, on the
units that also compare the scores, and hand them to the matrix units through registers instead of asynchronous copies.
``scan`` walks a row tile over one share of the codes. Every place of the tile has its own running maximum, so a score
costs a compare and two selects, and the tile is reduced once at the end. Codes beyond the last are NaN, which wins no
comparison: the loop has no mask.
``finish`` takes the best of the shares, and normalises that code and its row again, in float32.
"""

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(rows: int, codes: int, num_warps: int, num_stages: int = 3) -> Config:
    return Config({"BLOCK_ROWS": rows, "BLOCK_CODES": codes}, num_warps, num_stages)


# Every row tile reads all codes: 128 rows halve what 64 ask of the second-level cache, and two blocks fit on an sm_90.
# More than 64 channels are walked over in chunks, whose addresses take registers: there 128 rows would spill.
RULES = (
    Rule({"rows": 16}, tile(16, 128, 4)),
    Rule({"rows": 64, "channels": 64}, tile(64, 64, 4)),
    Rule({"channels": 64}, tile(128, 64, 8)),
    Rule({}, tile(64, 128, 8)),
)
TABLE = Table(
    "vq_lookup.scan",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=(
        tile(16, 64, 2),
        tile(16, 128, 4),
        tile(32, 128, 4),
        tile(64, 64, 4),
        tile(64, 128, 8),
        tile(64, 64, 4, 4),
        tile(128, 64, 8, 2),
        tile(128, 64, 8),
        tile(128, 64, 8, 4),
    ),
    scaling=("rows", "codes"),
)
PREPARE = Config({"BLOCK": 64}, num_warps=4)
FINISH = Config({"BLOCK": 16, "BLOCK_SHARES": 128}, num_warps=4)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SCALE = tl.constexpr(2048.0)
NO_CODE = tl.constexpr(2147483647)  # beyond every id
PROGRAMS_PER_SM = 2


@triton.jit
def norms(source, place, live, channels, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """max(|x|, 1e-12) of the vectors that start at ``source + place`` (BLOCK,), 1e-12 where not ``live``; and their
    largest absolute value."""
    square, largest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = live[:, None] & (channel < channels)[None, :]
        x = tl.load(source + place[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    norm = tl.sqrt_rn(square)
    return tl.where(norm < 1e-12, 1e-12, norm), largest  # keeps NaN, which a maximum may drop


@triton.jit
def split(
    source,
    parts,
    first,
    count,
    capacity,
    channels,
    padded,
    ROWS: tl.constexpr,  # the vectors are z's: only their direction matters
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Vectors ``first``.. of ``source`` (count, channels) to ``parts`` (2, capacity, padded); NaN beyond ``count``."""
    vector = first.to(tl.int64) + tl.arange(0, BLOCK)
    live = vector < count
    norm, largest = norms(source, vector * channels, live, channels, BLOCK, BLOCK_CHANNELS)
    if ROWS:  # divided by 1e-12, a tiny vector would vanish in float16
        norm = tl.where((norm == 1e-12) & (largest > 0.0), largest, norm)
    for start in range(0, padded, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = live[:, None] & (channel < channels)[None, :]
        x = tl.load(source + (vector * channels)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape)) * SCALE
        x = tl.where(live[:, None], x, float("nan"))
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        to = parts + (vector * padded)[:, None] + channel[None, :]
        inside = (vector < capacity)[:, None] & (channel < padded)[None, :]
        tl.store(to, high, mask=inside)
        tl.store(to + tl.cast(capacity, tl.int64) * padded, low, mask=inside)


@triton.jit
def prepare_kernel(
    z,  # (M, C)
    codebook,  # (V, C)
    row_parts,  # (2, M, padded) float16: the high parts, the low parts
    code_parts,  # (2, capacity, padded) float16, capacity >= V
    rows,
    num_codes,
    capacity,
    channels,
    padded,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    code_tiles = tl.cdiv(capacity, BLOCK)
    program = tl.program_id(0)
    if program < code_tiles:
        first = program * BLOCK
        split(codebook, code_parts, first, num_codes, capacity, channels, padded, False, BLOCK, BLOCK_CHANNELS)
    else:
        first = (program - code_tiles) * BLOCK
        split(z, row_parts, first, rows, rows, channels, padded, True, BLOCK, BLOCK_CHANNELS)


@triton.jit
def scan_kernel(
    row_parts,  # (2, M, padded) float16
    code_parts,  # (2, capacity, padded) float16, capacity a multiple of BLOCK_CODES
    scores,  # (shares, M) float32: largest score of a share of the codes, -inf if none is a number
    ids,  # (shares, M) int32: the lowest code that has it, anything where it is -inf
    rows,
    capacity,
    padded,
    tiles_per_share,
    ONE_CHUNK: tl.constexpr,  # padded == BLOCK_CHANNELS: the rows stay where they are
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    share = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    live = row < rows
    lane = tl.arange(0, BLOCK_CODES)
    chunk = tl.arange(0, BLOCK_CHANNELS)
    row_high = row_parts + (row * padded)[:, None] + chunk[None, :]
    row_low = row_high + tl.cast(rows, tl.int64) * padded
    code_high = code_parts + lane.to(tl.int64)[None, :] * padded + chunk[:, None]
    code_low = code_high + tl.cast(capacity, tl.int64) * padded
    if ONE_CHUNK:
        high = tl.load(row_high, mask=live[:, None], other=0.0)
        low = tl.load(row_low, mask=live[:, None], other=0.0)

    best = tl.full((BLOCK_ROWS, BLOCK_CODES), float("-inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.int32)
    begin = share * tiles_per_share
    end = tl.minimum(begin + tiles_per_share, capacity // BLOCK_CODES)
    for number in range(begin, end):
        place = tl.cast(number, tl.int64) * BLOCK_CODES * padded
        score = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.float32)
        if ONE_CHUNK:
            code = tl.load(code_high + place)
            score = tl.dot(low, code, score)
            score = tl.dot(high, tl.load(code_low + place), score)
            score = tl.dot(high, code, score)
        else:
            for start in range(0, padded, BLOCK_CHANNELS):
                high = tl.load(row_high + start, mask=live[:, None], other=0.0)
                low = tl.load(row_low + start, mask=live[:, None], other=0.0)
                code = tl.load(code_high + place + start)
                score = tl.dot(low, code, score)
                score = tl.dot(high, tl.load(code_low + place + start), score)
                score = tl.dot(high, code, score)
        larger = score > best  # strict: the earlier tile keeps a tie, and NaN never wins
        best = tl.where(larger, score, best)
        best_tile = tl.where(larger, number, best_tile)

    top = tl.max(best, axis=1)
    tied = best == top[:, None]
    code_id = tl.min(tl.where(tied, best_tile * BLOCK_CODES + lane[None, :], NO_CODE), axis=1)
    to = tl.cast(share, tl.int64) * rows + row
    tl.store(scores + to, top, mask=live)
    tl.store(ids + to, code_id, mask=live)


@triton.jit
def finish_kernel(
    z,  # (M, C)
    codebook,  # (V, C)
    scores,  # (shares, M) float32
    share_ids,  # (shares, M) int32
    ids,  # (M,) int64
    codes,  # (M, C) float32
    residual,  # (M, C) float32
    rows,
    channels,
    shares,
    BLOCK: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, shares, BLOCK_SHARES):  # a tile of them at a time: one after another would wait for each load
        share = start + tl.arange(0, BLOCK_SHARES)
        place = share.to(tl.int64)[:, None] * rows + row[None, :]
        mask = (share < shares)[:, None] & live[None, :]
        score = tl.load(scores + place, mask=mask, other=float("-inf"))
        top = tl.max(score, axis=0)
        tied = tl.where(score == top[None, :], tl.load(share_ids + place, mask=mask, other=NO_CODE), NO_CODE)
        larger = top > best  # shares come in the order of their codes
        best = tl.where(larger, top, best)
        code = tl.where(larger, tl.min(tied, axis=0), code)
    tl.store(ids + row, code, mask=live)

    row_norm, _ = norms(z, row * channels, live, channels, BLOCK, BLOCK_CHANNELS)
    code_norm, _ = norms(codebook, code * channels, live, channels, BLOCK, BLOCK_CHANNELS)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = live[:, None] & (channel < channels)[None, :]
        x = tl.load(z + (row * channels)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(codebook + (code * channels)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.broadcast_to(row_norm[:, None], x.shape))
        y = tl.div_rn(y, tl.broadcast_to(code_norm[:, None], y.shape))
        to = (row * channels)[:, None] + channel[None, :]
        tl.store(codes + to, y, mask=mask)
        tl.store(residual + to, x - y, mask=mask)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; the interpreter runs programs one after another, so the fewer the better."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def cut(rows: int, num_codes: int, blocks: Mapping[str, int], multiprocessors: int) -> tuple[int, int]:
    """(tiles of codes per share, shares) so that about two programs run on every multiprocessor, in one wave if the
    row tiles alone do not fill it."""
    row_tiles, code_tiles = triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(num_codes, blocks["BLOCK_CODES"])
    wanted = min(code_tiles, max(1, PROGRAMS_PER_SM * multiprocessors // row_tiles))
    tiles_per_share = triton.cdiv(code_tiles, wanted)
    return tiles_per_share, triton.cdiv(code_tiles, tiles_per_share)


def chunk_of(channels: int) -> int:
    """Channels per product: at least the 16 that a matrix instruction takes."""
    return min(64, max(16, triton.next_power_of_2(channels)))


def vq_lookup(
    z: torch.Tensor, codebook: torch.Tensor, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids int64, codes float32, residual float32) of z (M, C) in codebook (V, C), each float32, float16 or bfloat16;
    copied first where they are not contiguous. Three launches on the current device; formula and checks:
    ``reference/vq_lookup.py``, ``ops/vq_lookup.py``.
    """
    (rows, channels), num_codes, device = z.shape, codebook.shape[0], z.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    codes, residual = (torch.empty(rows, channels, dtype=torch.float32, device=device) for _ in range(2))
    if rows == 0:
        return ids, codes, residual
    z, codebook = z.contiguous(), codebook.contiguous()
    config = config or TABLE.pick(device, rows=rows, codes=num_codes, channels=channels)
    chunk = chunk_of(channels)
    padded = triton.cdiv(channels, chunk) * chunk
    tiles_per_share, shares = cut(rows, num_codes, config.blocks, multiprocessors(device))
    capacity = triton.cdiv(num_codes, config.blocks["BLOCK_CODES"]) * config.blocks["BLOCK_CODES"]
    row_parts = torch.empty(2, rows, padded, dtype=torch.float16, device=device)
    code_parts = torch.empty(2, capacity, padded, dtype=torch.float16, device=device)
    scores = torch.empty(shares, rows, dtype=torch.float32, device=device)
    share_ids = torch.empty(shares, rows, dtype=torch.int32, device=device)

    block = PREPARE.blocks["BLOCK"]
    prepare_kernel[(triton.cdiv(capacity, block) + triton.cdiv(rows, block),)](
        z,
        codebook,
        row_parts,
        code_parts,
        rows,
        num_codes,
        capacity,
        channels,
        padded,
        BLOCK_CHANNELS=chunk,
        **PREPARE.launch,
    )
    scan_kernel[(triton.cdiv(rows, config.blocks["BLOCK_ROWS"]) * shares,)](
        row_parts,
        code_parts,
        scores,
        share_ids,
        rows,
        capacity,
        padded,
        tiles_per_share,
        ONE_CHUNK=padded == chunk,
        BLOCK_CHANNELS=chunk,
        **config.launch,
    )
    finish_kernel[(triton.cdiv(rows, FINISH.blocks["BLOCK"]),)](
        z,
        codebook,
        scores,
        share_ids,
        ids,
        codes,
        residual,
        rows,
        channels,
        shares,
        BLOCK_CHANNELS=chunk,
        **FINISH.launch,
    )
    return ids, codes, residual


def cases() -> list[Case]:
    """Tokenising one image and sixteen at 512 px."""

    def case(rows: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            z, codebook = torch.randn(rows, 32, device=device, dtype=dtype), torch.randn(16384, 32, device=device)
            return lambda config: vq_lookup(z, codebook, config)

        return Case(f"{DTYPES[dtype]} {rows}x16384x32", TABLE, {"rows": rows, "codes": 16384, "channels": 32}, prepare)

    return [case(rows, dtype) for rows in (256, 4096) for dtype in (torch.float32, torch.bfloat16)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """What the full-size model launches, 32 channels and any input type; the scan for few rows; 4 to 96 channels."""
    shapes = [(rows, 32) for rows in (16, 64, 4096)] + [(4096, channels) for channels in (4, 64, 96)]
    found = [
        Variant(
            name="vq_lookup.scan",
            dtype="fp16x3",
            shape=f"M={rows} C={channels}",
            config=config,
            kernel=scan_kernel,
            signature={"row_parts": "*fp16", "code_parts": "*fp16", "scores": "*fp32", "ids": "*i32"}
            | dict.fromkeys(("rows", "capacity", "padded", "tiles_per_share"), "i32"),
            constexprs={"ONE_CHUNK": channels <= chunk_of(channels), "BLOCK_CHANNELS": chunk_of(channels)},
            multiples_of_16=("rows", "capacity", "padded"),
            tensor_cores=True,
        )
        for rows, channels in shapes
        for config in TABLE.configs(capability, every, rows=rows, codes=16384, channels=channels)
    ]
    sizes = dict.fromkeys(("rows", "num_codes", "capacity", "channels", "padded", "shares"), "i32")
    for channels in (32, 96):
        for dtype in DTYPES.values():
            inputs = {"z": f"*{dtype}", "codebook": "*fp32"}
            shared = {
                "dtype": dtype,
                "shape": f"C={channels}",
                "constexprs": {"BLOCK_CHANNELS": chunk_of(channels)},
                "multiples_of_16": ("rows", "num_codes", "capacity", "channels", "padded"),
            }
            parts = {"row_parts": "*fp16", "code_parts": "*fp16"}
            results = {"scores": "*fp32", "share_ids": "*i32", "ids": "*i64", "codes": "*fp32", "residual": "*fp32"}
            found += [
                Variant(
                    "vq_lookup.prepare",
                    config=PREPARE,
                    kernel=prepare_kernel,
                    signature=inputs | parts | sizes,
                    **shared,
                ),
                Variant(
                    "vq_lookup.finish",
                    config=FINISH,
                    kernel=finish_kernel,
                    signature=inputs | results | sizes,
                    **shared,
                ),
            ]
    return found
