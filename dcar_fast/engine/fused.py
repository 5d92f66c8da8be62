"""The engine of GPUs: every stage on fused ops, seven or eight launches a block, nothing looked at on the host.

The residual stream is passed on with the row moments that its producer leaves, so that LayerNorm is part of the next
matrix product (``ops.fused_linear``). Texts are given by their lengths: each row's mask is a prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.engine.base import Engine, layer_norm, take
from dcar_fast.engine.fused_head import FusedHead
from dcar_fast.engine.fused_text import NullTexts, TextReader, Texts
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.models.transformer import Block
from dcar_fast.noise import LatentNoise, TokenNoise
from dcar_fast.ops import cross_attention, embed_tokens, fused_linear, sample_tokens, self_attention
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.reference.positions import sincos_positions

PIECE = 64  # columns of one row moment, see ops.fused_linear


class Stream(NamedTuple):
    """The residual stream x (R, N, D) and its row moments (R, N, ceil(D / 64), 2), None where nobody needs them."""

    x: Tensor
    moments: Tensor | None


class Layer(NamedTuple):
    """A linear layer: weight (V, K), bias (V,), and the weight's sums over K (V,) where LayerNorm is folded in."""

    weight: Tensor
    bias: Tensor
    colsum: Tensor | None = None

    @classmethod
    def of(cls, layer: torch.nn.Linear, dtype: torch.dtype, normed: bool = False) -> Layer:
        weight = layer.weight.detach().to(dtype).contiguous()
        return cls(weight, layer.bias.detach().to(dtype), weight.float().sum(dim=1) if normed else None)


class FusedBlock:
    """One block's weights; see ``models.transformer.Block`` for the formula."""

    def __init__(self, block: Block, dtype: torch.dtype, backend: str | None) -> None:
        attention, cross = block.self_attn, block.cross_attn
        self.heads, self.backend = attention.num_heads, backend
        self.proj = Layer.of(attention.proj, dtype)
        norms = (attention.q_norm, attention.k_norm)
        self.norms = [t.detach().to(dtype) for norm in norms for t in (norm.weight, norm.bias)]
        self.cross_q, self.cross_proj = Layer.of(cross.q, dtype), Layer.of(cross.proj, dtype)
        self.width = attention.proj.in_features
        self.pack_large(attention.qkv, block.mlp.fc1, block.mlp.fc2, dtype)

    def pack_large(self, qkv: nn.Linear, fc1: nn.Linear, fc2: nn.Linear, dtype: torch.dtype) -> None:
        """The layers that :meth:`normed` and :meth:`plain` multiply with."""
        self.qkv, self.fc1 = Layer.of(qkv, dtype, normed=True), Layer.of(fc1, dtype, normed=True)
        self.fc2 = Layer.of(fc2, dtype)

    def normed(self, stream: Stream, layer: Layer, **how):
        """LayerNorm and a large layer."""
        return self.linear(stream.x, layer, moments=stream.moments, **how)

    def plain(self, x: Tensor, layer: Layer, **how):
        """A large layer."""
        return self.linear(x, layer, **how)

    def self_attention(self, stream: Stream) -> Tensor:
        """(R, N, D), before the output projection. Two launches, three where D is no multiple of 64."""
        whole = self.width % PIECE == 0  # else pieces of q, k and v overlap
        found = self.normed(stream, self.qkv, emit_moments=whole)
        qkv, moments = found if whole else (found, None)
        return self_attention(qkv, *self.norms, heads=self.heads, moments=moments, backend=self.backend)

    def cross_attention(self, x: Tensor, texts: Texts, layer: int) -> Stream:
        """x plus what it sees of its text. Three launches; two where the projections are absorbed."""
        last = {"residual": x, "emit_moments": True}
        if texts.absorbed is not None:
            keys, key_bias, values = (t[layer] for t in texts.absorbed)
            scores = fused_linear(x, keys, key_bias, out_dtype=torch.float32, backend=self.backend)
            seen = {"lengths": texts.lengths, "group": texts.length}
            return Stream(*fused_linear(scores, values, self.cross_proj.bias, **seen, **last, backend=self.backend))
        q = self.linear(x, self.cross_q).unflatten(-1, (self.heads, -1))
        k, v = texts.keys_values[:, :, layer].unbind(2)  # (R, T, H, d) each
        looked = cross_attention(q, k, v, texts.lengths, backend=self.backend).flatten(2)
        return Stream(*self.linear(looked, self.cross_proj, **last))

    def mlp(self, stream: Stream, last: bool) -> Stream:
        """Two launches."""
        hidden = self.normed(stream, self.fc1, activation="gelu")
        if last:
            return Stream(self.plain(hidden, self.fc2, residual=stream.x), None)
        return Stream(*self.plain(hidden, self.fc2, residual=stream.x, emit_moments=True))

    def linear(self, x: Tensor, layer: Layer, **how):
        colsum = layer.colsum if how.get("moments") is not None else None
        return fused_linear(x, layer.weight, layer.bias, colsum=colsum, backend=self.backend, **how)


class FusedEngine(Engine):
    """Weights in ``dtype``; ``backend`` as in the ops, None for their own choice."""

    block: type[FusedBlock] = FusedBlock

    def __init__(self, model: DCAR, dtype: torch.dtype, backend: str | None) -> None:
        super().__init__(model.config, dtype)
        self.backend = backend
        self.embedding = model.token_embedding.weight.detach().to(dtype)
        self.blocks = [self.block(block, dtype, backend) for block in model.blocks]
        self.reader = TextReader(model, dtype, backend)
        self.nulls = NullTexts(self.reader, model.null_text.detach().to(dtype))
        self.to_logits = Layer.of(model.to_logits, dtype)
        self.head = FusedHead(model.head, diffusion_schedule(model.config.head_steps), dtype, backend)
        self._grids = OrderedDict({model.config.grid: model.position.detach().to(dtype)})

    def read(self, states: Tensor, mask: Tensor) -> Texts:
        return self.reader.join(self.reader(states), self.nulls(mask.shape[1]), mask)

    def hidden(
        self,
        ids: Tensor,
        grid: tuple[int, int],
        texts: Texts,
        guided: bool,
        rows: Tensor | None = None,
        alike: bool = False,
    ) -> Tensor:
        batch, branches = len(ids), 2 if guided else 1
        return self._trunk(ids, grid, texts.of(branches * batch), branches, rows, alike)

    def null_hidden(self, ids: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
        texts = self.reader.alone(self.nulls(mask.shape[1]), mask)
        return self._trunk(ids, grid, texts, 1, None, alike=True)

    def logits(self, hidden: Tensor) -> Tensor:
        weight, bias, _ = self.to_logits
        return F.linear(layer_norm(hidden.float()).to(weight.dtype), weight, bias)

    def choose(
        self, cond: Tensor, uncond: Tensor | None, *, noise: Tensor | TokenNoise, **settings: float
    ) -> tuple[Tensor, Tensor]:
        cond, uncond = (x if x is None else layer_norm(x.float()) for x in (cond, uncond))
        weight, bias, _ = self.to_logits
        return sample_tokens(cond, uncond, weight, bias, noise=noise, backend=self.backend, **settings)

    def denoise(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor | LatentNoise],
        *,
        guidance: float,
        dialect: Dialect,
        progress: Callable[[int], None],
    ) -> Tensor:
        return self.head(condition, latent_init, latent, guidance=guidance, dialect=dialect, progress=progress)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def no_graph(self) -> str | None:
        reason = super().no_graph()
        return "the reference is not captured" if reason is None and self.backend == "reference" else reason

    def constants(self, grid: tuple[int, int], length: int) -> tuple:
        return self.positions(grid), self.nulls(length)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(h w, D), kept per grid."""
        if grid not in self._grids:
            self._grids[grid] = sincos_positions(self.config.hidden_size, *grid).to(self.embedding)
        return self._grids[grid]

    def _trunk(
        self, ids: Tensor, grid: tuple[int, int], texts: Texts, branches: int, rows: Tensor | None, alike: bool
    ) -> Tensor:
        """Until the first cross-attention the branches are one, and so are all images whose ids are alike."""
        batch = len(ids)
        stream = Stream(
            *embed_tokens(ids[:1] if alike else ids, self.embedding, self.positions(grid), backend=self.backend)
        )
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            looked, x = block.self_attention(stream), stream.x
            if last and rows is not None:
                cut = rows if len(x) == 1 else rows.repeat(len(x) // batch, 1)
                looked, x = take(looked, cut), take(x, cut)
            x = block.linear(looked, block.proj, residual=x)
            if i == 0:
                x = x.expand(batch, -1, -1).repeat(branches, 1, 1)
            stream = block.mlp(block.cross_attention(x, texts, i), last)
        return stream.x
