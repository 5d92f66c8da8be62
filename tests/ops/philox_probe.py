"""A Triton kernel that writes down what kernels/philox.py draws; imported where triton is there."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox


@triton.jit
def probe_kernel(seeds, quads, tokens, step, stream, words, uniforms, gumbels, normals, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    seed, quad = tl.load(seeds + i, mask=live, other=0), tl.load(quads + i, mask=live, other=0)
    drawn = philox.philox(seed, quad, tl.load(tokens + i, mask=live, other=0), step, stream)
    normal = philox.normal(drawn[0], drawn[1], drawn[2], drawn[3])
    for word in tl.static_range(4):
        u = philox.uniform(drawn[word])
        tl.store(words + 4 * i + word, drawn[word].to(tl.int64), mask=live)
        tl.store(uniforms + 4 * i + word, u, mask=live)
        tl.store(gumbels + 4 * i + word, philox.gumbel(u), mask=live)
        tl.store(normals + 4 * i + word, normal[word], mask=live)


@triton.jit
def gumbel_kernel(uniforms, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, philox.gumbel(tl.load(uniforms + i, mask=i < count, other=0.5)), mask=i < count)


def draw(
    seeds: torch.Tensor, quads: torch.Tensor, tokens: torch.Tensor, step: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words as int64, uniforms, Gumbel noise and normals, each (count, 4), for int64 tensors (count,)."""
    count = len(seeds)
    words = torch.empty(count, 4, dtype=torch.int64, device=seeds.device)
    floats = [torch.empty(count, 4, device=seeds.device) for _ in range(3)]
    probe_kernel[(triton.cdiv(count, 256),)](seeds, quads, tokens, step, stream, words, *floats, count, BLOCK=256)
    return words, *floats


def gumbel(uniforms: torch.Tensor) -> torch.Tensor:
    """kernels/philox.py's Gumbel noise of uniforms (count,)."""
    out = torch.empty_like(uniforms)
    gumbel_kernel[(triton.cdiv(len(uniforms), 4096),)](uniforms, out, len(uniforms), BLOCK=4096)
    return out
