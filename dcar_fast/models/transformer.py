"""The masked transformer (PixArt-style blocks without adaptive normalisation)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head attention; q and k are normalised over the full width before they are split into heads."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class CrossAttention(nn.Module):
    """Image tokens attend to the text; keys outside the mask are ignored, no text at all gives zeros."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D), text y (B, T, D), mask (B, T) bool -> (B, N, D)."""
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), *self.kv(y).chunk(2, dim=-1)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # mask (B, 1, 1, T)
        return self.proj(merge_heads(out))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x += self_attn(LN(x)); x += cross_attn(x, text); x += mlp(LN(x)); LN without affine, eps 1e-6."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, num_heads, qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, mlp_hidden, dim)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(x, y, mask)
        return x + self.mlp(self.norm2(x))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return x.transpose(1, 2).flatten(2)
