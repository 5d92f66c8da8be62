"""Attention over a prefix of the keys, as long as each image's prompt: flash attention in one launch."""

import torch

from dcar_fast.kernels._attention import TYPES, attend, attention_kernel, constants, table, table_sizes
from dcar_fast.kernels.configs import Case, Config
from dcar_fast.kernels.offline import Variant

TABLE = table("cross_attention")
HEADS, HEAD, QUERIES = 16, 72, 256  # of the full-size model at 512 px


def cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, config: Config | None = None
) -> torch.Tensor:
    """softmax(q k^T d^-0.5) v over the first ``lengths[b]`` keys of row b, with lengths beyond 0..T taken as 0 or T.

    q (B, N, H, d), k and v (B, T, H, d), of one type out of ``TYPES``, lengths (B,) int64 -> (B, N, H, d). One launch
    on the current device, more only to copy tensors whose last dimension is strided. Formula and checks:
    ``reference/cross_attention.py``, ``ops/cross_attention.py``.
    """
    return attend(q, k, v, lengths.contiguous(), None, TABLE, config)


def cases() -> list[Case]:
    """The full-size model at 512 px, one image and sixteen with their unconditional rows, short and long prompts."""

    def case(rows: int, keys: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            q = torch.randn(rows, QUERIES, HEADS, HEAD, device=device).to(dtype)
            kv = torch.randn(rows, keys, 2, HEADS, HEAD, device=device).to(dtype)
            lengths = torch.full((rows,), keys, device=device)
            return lambda config: cross_attention(q, kv[:, :, 0], kv[:, :, 1], lengths, config)

        sizes = table_sizes(HEAD, dtype, rows * HEADS * QUERIES)
        return Case(f"{TYPES[dtype]} {rows}x{QUERIES} T={keys}", TABLE, sizes, prepare)

    return [case(rows, keys, dtype) for dtype in TYPES for rows in (2, 32) for keys in (64, 300)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size model's head size for few and many rows, other sizes in bfloat16, and the largest in float32."""
    pointers = ("q", "k", "v", "out")
    sizes = ("queries", "keys", "heads", "images")
    strides = [f"{x}_{stride}" for x in "qkv" for stride in ("image", "row", "head")]
    situations = [(HEAD, dtype, rows) for dtype in TYPES for rows in (2, 32)]
    situations += [(head, torch.bfloat16, rows) for head in (32, 64, 80, 128) for rows in (2, 32)]
    situations += [(128, torch.float32, 2)]
    return [
        Variant(
            name="cross_attention",
            dtype=TYPES[dtype],
            shape=f"d={head} {rows}x{QUERIES}",
            config=config,
            kernel=attention_kernel,
            signature=dict.fromkeys(pointers, f"*{TYPES[dtype]}")
            | {"lengths": "*i64", "scale": "fp32"}
            | dict.fromkeys((*sizes, *strides), "i32"),
            constexprs=constants(head, dtype, ragged=True),
            multiples_of_16=("queries", "heads", *(stride for stride in strides if not stride.endswith("head"))),
            tensor_cores=True,
        )
        for head, dtype, rows in situations
        for config in TABLE.configs(capability, every, **table_sizes(head, dtype, rows * HEADS * QUERIES))
    ]
