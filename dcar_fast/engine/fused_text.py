"""What the cross-attentions of all layers look at, made once per prompt in a handful of launches.

A prompt of few tokens absorbs the projections: with q_h = x Wq_h + bq_h, scores = x (Wq_h K_h^T) + bq_h K_h^T and
output = softmax(scores) (V_h Wo_h), where both products in brackets do not depend on x. See :func:`absorbs`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.models.dcar import DCAR
from dcar_fast.ops import fused_linear

GROUPS = (16, 32, 64)  # keys per head that ops.fused_linear takes for its softmax
KEPT = 8  # lengths of the null text that are kept


def absorbs(width: int, heads: int, length: int) -> int | None:
    """The number of keys per head to pad ``length`` to where absorbing pays, else None.

    Per position, absorbed attention takes 2 heads T D multiply-adds, the usual way 2 D^2 + 2 T D. But absorbed keys are
    heads times as large, and every image has its own: half the work is asked for, before they are read instead.
    """
    padded = next((size for size in GROUPS if length <= size), None)
    return padded if padded is not None and 2 * heads * padded <= width + padded else None


class Absorbed(NamedTuple):
    """Of L layers and G texts: keys (L, G, H T, D), key_bias (L, G, H T), values (L, G, D, H T)."""

    keys: Tensor
    key_bias: Tensor
    values: Tensor


class Texts(NamedTuple):
    """What R rows of the trunk look at: the first ``lengths`` (R,) int64 of ``length`` keys each.

    keys_values (R, T, L, 2, H, d), or absorbed with G <= R texts, of which the last one serves all further rows.
    """

    lengths: Tensor
    length: int
    keys_values: Tensor | None
    absorbed: Absorbed | None

    def of(self, rows: int) -> Texts:
        """The first ``rows`` rows."""
        kept = None if self.keys_values is None else self.keys_values[:rows]
        return self._replace(lengths=self.lengths[:rows], keys_values=kept)


Reading = Tensor | Absorbed  # of G texts; keys and values (G, T, L, 2, H, d)


class TextReader:
    """The text projection and the cross-attentions' side of it, packed over all layers."""

    def __init__(self, model: DCAR, dtype: torch.dtype, backend: str | None) -> None:
        c, crosses = model.config, [block.cross_attn for block in model.blocks]
        self.heads, self.width, self.layers = c.num_heads, c.hidden_size, len(crosses)
        self.dtype, self.backend = dtype, backend
        self.steps = [
            tuple(t.detach().to(dtype) for t in (fc.weight, fc.bias))
            for fc in (model.text_proj.fc1, model.text_proj.fc2)
        ]
        self.weight = torch.cat([cross.kv.weight.detach() for cross in crosses]).to(dtype)  # (L 2 D, D)
        self.bias = torch.cat([cross.kv.bias.detach() for cross in crosses]).to(dtype)
        if absorbs(self.width, self.heads, 1):
            scale = (self.width // self.heads) ** -0.5
            split = (self.layers * self.heads, -1)
            q = torch.cat([cross.q.weight.detach() for cross in crosses]) * scale  # (L D, D)
            q_bias = torch.cat([cross.q.bias.detach() for cross in crosses]) * scale
            out = torch.cat([cross.proj.weight.detach().T for cross in crosses])  # (L D, D): rows are heads' channels
            self.query, self.query_bias = q.to(dtype).unflatten(0, split), q_bias.to(dtype).unflatten(0, split)
            self.output = out.to(dtype).unflatten(0, split).transpose(1, 2).contiguous()  # (L H, D, d)

    def __call__(self, states: Tensor) -> Reading:
        """Text states (G, T, Dt) -> the reading of G texts, padded to what :func:`absorbs` says."""
        length = absorbs(self.width, self.heads, states.shape[1])
        if length is not None:
            states = F.pad(states, (0, 0, 0, length - states.shape[1]))
        (weight1, bias1), (weight2, bias2) = self.steps
        y = fused_linear(states.to(self.dtype), weight1, bias1, activation="gelu", backend=self.backend)
        y = fused_linear(y, weight2, bias2, backend=self.backend)  # (G, T, D)
        read = fused_linear(y, self.weight, self.bias, backend=self.backend)
        read = read.unflatten(-1, (self.layers, 2, self.heads, -1))  # (G, T, L, 2, H, d)
        return read if length is None else self._absorb(read)

    def join(self, prompts: Reading, null: Reading, mask: Tensor) -> Texts:
        """Of B prompts and the null text, for 2 B rows; mask (B, T) bool, whose True come first."""
        lengths = mask.sum(dim=1).repeat(2)
        if isinstance(prompts, Absorbed):
            both = Absorbed(*(torch.cat(pair, dim=1) for pair in zip(prompts, null, strict=True)))
            return self._texts(lengths, both)
        return self._texts(lengths, torch.cat((prompts, null.expand(len(prompts), *null.shape[1:]))))

    def alone(self, reading: Reading, mask: Tensor) -> Texts:
        """Of one text for all rows of the mask (R, T)."""
        if not isinstance(reading, Absorbed):
            reading = reading.expand(len(mask), *reading.shape[1:])
        return self._texts(mask.sum(dim=1), reading)

    def _texts(self, lengths: Tensor, reading: Reading) -> Texts:
        if isinstance(reading, Absorbed):
            return Texts(lengths, reading.keys.shape[2] // self.heads, None, reading)
        return Texts(lengths, reading.shape[1], reading, None)

    def _absorb(self, read: Tensor) -> Absorbed:
        """Keys and values (G, T, L, 2, H, d) -> with the projections multiplied in."""
        texts, length = read.shape[:2]
        k, v = read.permute(3, 2, 4, 0, 1, 5).reshape(2, self.layers * self.heads, texts * length, -1)  # (L H, G T, d)
        layout = (self.layers, self.heads, texts, length)
        keys = torch.bmm(k, self.query).view(*layout, self.width)  # (L, H, G, T, D)
        key_bias = torch.bmm(k, self.query_bias[..., None]).view(layout)
        values = torch.bmm(self.output, v.transpose(1, 2)).view(self.layers, self.heads, self.width, texts, length)
        return Absorbed(
            keys.transpose(1, 2).flatten(2, 3).contiguous(),  # (L, G, H T, D)
            key_bias.transpose(1, 2).flatten(2).contiguous(),
            values.permute(0, 3, 2, 1, 4).flatten(3).contiguous(),  # (L, G, D, H T)
        )


class NullTexts:
    """Readings of the null text (T, Dt), one per length met lately."""

    def __init__(self, reader: TextReader, states: Tensor) -> None:
        self.reader, self.states = reader, states
        self._kept: OrderedDict[int, Reading] = OrderedDict()

    def __call__(self, length: int) -> Reading:
        """Of its first ``length`` states; further ones, which nobody looks at, are zero."""
        if length not in self._kept:
            states = F.pad(self.states[:length], (0, 0, 0, max(0, length - len(self.states))))
            self._kept[length] = self.reader(states[None])
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(length)
        return self._kept[length]
