"""The transformer of DC-AR without what repeats or cannot matter.

Rows are [cond; uncond], (2B, N, D), or the conditional ones alone. Against the module this skips, exactly:

- keys and values of the text in every step: made once per prompt (:meth:`Trunk.read`), those of the null text once per
  model;
- the first layer of the unconditional rows up to its cross-attention: until there both branches are equal;
- in the last layer every position that nobody looks at: its queries, cross-attention and MLP (``rows``);
- the query and output projections of the cross-attention where the prompt is so short that both are cheaper multiplied
  into its keys and values once (:func:`absorbs`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.engine.base import layer_norm, take
from dcar_fast.engine.linear import Linear
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.transformer import Block, merge_heads, split_heads
from dcar_fast.reference.positions import sincos_positions

NULL_TEXTS = 4  # lengths of the null text whose keys and values are kept


def absorbs(dim: int, num_heads: int, length: int) -> bool:
    """Whether x (Wq_h K_h^T) and P (V_h Wo_h) take fewer FLOPs per position than q, attention and output projection:
    2 heads T D against 2 D^2 + 2 T D multiply-adds, with T the length of the prompt."""
    return num_heads * length < dim + length


class PackedBlock:
    """One block's weights in the layout that runs fastest."""

    def __init__(self, block: Block, dtype: torch.dtype, last: bool) -> None:
        attention, cross = block.self_attn, block.cross_attn
        self.num_heads, width = attention.num_heads, attention.proj.in_features
        self.q_norm, self.k_norm = _affine(attention.q_norm, dtype), _affine(attention.k_norm, dtype)
        weight, bias = attention.qkv.weight, attention.qkv.bias
        self.qkv = Linear(weight, bias, dtype)
        if last:  # queries of some positions, keys and values of all
            self.q, self.kv = Linear(weight[:width], bias[:width], dtype), Linear(weight[width:], bias[width:], dtype)
        self.proj = Linear.of(attention.proj, dtype)
        self.cross_q, self.cross_kv = Linear.of(cross.q, dtype), Linear.of(cross.kv, dtype)
        self.cross_proj = Linear.of(cross.proj, dtype)
        self.cross = cross
        self.fc1, self.fc2 = Linear.of(block.mlp.fc1, dtype), Linear.of(block.mlp.fc2, dtype)

    def absorbable(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The query projection with the scale 1/sqrt(d), (H, d, D) and (H, d), and the output projection, (D, H, d) and
        (D,)."""
        q, proj = self.cross.q, self.cross.proj
        scale = (q.out_features // self.num_heads) ** -0.5
        weight, bias = (t.detach().to(dtype).mul(scale).unflatten(0, (self.num_heads, -1)) for t in (q.weight, q.bias))
        return (
            weight,
            bias,
            proj.weight.detach().to(dtype).unflatten(1, (self.num_heads, -1)),
            proj.bias.detach().to(dtype),
        )

    def self_attention(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x (R, N, D) -> (R, N, D), or (R, n, D) for the positions ``rows`` (R, n)."""
        normed = layer_norm(x)
        if rows is None:
            q, k, v = self.qkv(normed).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(take(normed, rows)), self.kv(normed).chunk(2, dim=-1)
        q, k = _normalise(q, self.q_norm), _normalise(k, self.k_norm)
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(layer_norm(x), gelu=True))


@dataclass(frozen=True)
class Keys:
    """One layer's keys and values of the texts, (B or 1, H, T, d) each."""

    k: Tensor
    v: Tensor

    def attend(self, block: PackedBlock, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D), mask (B, T) bool, True = look -> (B, N, D)."""
        q = split_heads(block.cross_q(x), block.num_heads)
        k, v = (t.expand(len(x), -1, -1, -1) for t in (self.k, self.v))
        return block.cross_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])))


@dataclass(frozen=True)
class Absorbed:
    """The same with the projections multiplied in: scores = x keys + key_bias, output = softmax(scores) values + bias.

    keys (B or 1, D, H T) hold the scale 1/sqrt(d) too, key_bias (B or 1, 1, H T), values (B or 1, H T, D).
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor
    bias: Tensor

    def attend(self, block: PackedBlock, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D), mask (B, T) bool, True = look -> (B, N, D)."""
        shared = len(self.keys) == 1  # one text for all rows: one matrix product instead of a batch of them
        scores = x @ self.keys[0] + self.key_bias if shared else torch.baddbmm(self.key_bias, x, self.keys)
        scores = scores.unflatten(-1, (block.num_heads, -1)).float()  # (B, N, H, T)
        weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(~mask.any(dim=1)[:, None, None, None], 0.0)  # a softmax over nothing is NaN
        weights = weights.to(x.dtype).flatten(2)
        return weights @ self.values[0] + self.bias if shared else torch.baddbmm(self.bias, weights, self.values)


Text = list[Keys] | list[Absorbed]


class Trunk:
    """A DCAR's embedding and blocks, packed in ``dtype``; made for sampling, without gradients."""

    def __init__(self, model: DCAR, dtype: torch.dtype) -> None:
        c = model.config
        self.config, self.dtype = c, dtype
        self.embedding = model.token_embedding.weight.detach().to(dtype)
        self.text_fc1, self.text_fc2 = Linear.of(model.text_proj.fc1, dtype), Linear.of(model.text_proj.fc2, dtype)
        self.blocks = [PackedBlock(block, dtype, block is model.blocks[-1]) for block in model.blocks]
        self.null_text = model.null_text.detach().to(dtype)
        self._grids = {c.grid: model.position.detach().to(dtype)}
        self._nulls: OrderedDict[int, Text] = OrderedDict()

    def read(self, states: Tensor) -> Text:
        """Text states (B, T, Dt) -> what the cross-attentions of all layers look at."""
        y = self.text_fc2(self.text_fc1(states.to(self.dtype), gelu=True))  # (B, T, D)
        return [self._read_layer(block, y) for block in self.blocks]

    def null(self, length: int) -> Text:
        """The same of the first ``length`` states of the null text, kept for the lengths met lately."""
        if length not in self._nulls:
            self._nulls[length] = self.read(self.null_text[None, :length])
            if len(self._nulls) > NULL_TEXTS:
                self._nulls.popitem(last=False)
        self._nulls.move_to_end(length)
        return self._nulls[length]

    def _read_layer(self, block: PackedBlock, y: Tensor) -> Keys | Absorbed:
        heads = block.num_heads
        k, v = (split_heads(t, heads) for t in block.cross_kv(y).chunk(2, dim=-1))  # (B, H, T, d)
        # in 16 bits it would round the scores too, which multiplies the error by up to 2
        if self.dtype != torch.float32 or not absorbs(self.config.hidden_size, heads, y.shape[1]):
            return Keys(k, v)
        query, query_bias, output, bias = block.absorbable(k.dtype)
        keys = torch.einsum("bhtd,hdi->biht", k, query).flatten(2)
        key_bias = torch.einsum("bhtd,hd->bht", k, query_bias).flatten(1)[:, None]
        values = torch.einsum("bhtd,ohd->bhto", v, output).flatten(1, 2)
        return Absorbed(keys, key_bias, values, bias)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(h w, D), kept per grid."""
        if grid not in self._grids:
            self._grids[grid] = sincos_positions(self.config.hidden_size, *grid).to(self.embedding)
        return self._grids[grid]

    def __call__(
        self,
        ids: Tensor,
        grid: tuple[int, int],
        texts: list[Text],
        mask: Tensor,
        rows: Tensor | None = None,
        alike: bool = False,
    ) -> Tensor:
        """ids (B, N) and one or two texts (conditional, null) -> hidden (B or 2B, N, D); mask (B, T) bool for both.

        rows (B, n): the positions wanted, the result is (B or 2B, n, D). alike: all rows of ids are the same.
        """
        batch, branches, last = len(ids), len(texts), len(self.blocks) - 1
        x = F.embedding(ids[:1] if alike else ids, self.embedding) + self.positions(grid)
        for i, block in enumerate(self.blocks):
            cut = None
            if rows is not None and i == last:
                cut = rows.repeat(len(x) // batch, 1)
            x = (x if cut is None else take(x, cut)) + block.self_attention(x, cut)
            if i == 0:  # until here the branches were one
                x = x.expand(batch, -1, -1).repeat(branches, 1, 1)
            looked = [text[i].attend(block, part, mask) for text, part in zip(texts, x.split(batch), strict=True)]
            x = x + (torch.cat(looked) if branches > 1 else looked[0])
            x = x + block.mlp(x)
        return x


def _affine(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    if not isinstance(norm, nn.LayerNorm):
        return None
    return norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)


def _normalise(x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if affine is None else F.layer_norm(x, x.shape[-1:], *affine, eps=1e-5)
