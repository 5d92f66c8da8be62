"""DC-AR, the generator: text states and partly masked token ids -> logits over the codes and hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcar_fast.config import DCARConfig
from dcar_fast.models._checks import check_ids, check_tensor
from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.models.transformer import MLP, Block
from dcar_fast.reference.positions import sincos_positions


@dataclass
class Output:
    """logits (B, N, V): no MASK logit; hidden (B, N, D): before the last norm, what the diffusion head sees."""

    logits: Tensor
    hidden: Tensor


class DCAR(nn.Module):
    """Masked transformer and diffusion head. ``head`` denoises residuals given ``Output.hidden``.

    ``position`` (N, D) is the stored table of the square grid ``config.grid``; ``null_text`` (T, Dt) replaces the text
    states of unconditional rows. Both are buffers: checkpoints hold them, optimisers leave them alone.
    """

    def __init__(self, config: DCARConfig | None = None) -> None:
        super().__init__()
        self.config = c = DCARConfig() if config is None else config
        if not isinstance(c, DCARConfig):
            raise ValueError(f"config must be a DCARConfig, got {type(c).__name__}")
        self.token_embedding = nn.Embedding(c.codebook_size + 1, c.hidden_size)  # the last row is MASK
        self.register_buffer("position", sincos_positions(c.hidden_size, *c.grid))
        self.register_buffer("null_text", torch.randn(c.text_length, c.text_dim) / math.sqrt(c.text_dim))
        self.text_proj = MLP(c.text_dim, c.hidden_size, c.hidden_size)
        self.blocks = nn.ModuleList(
            Block(c.hidden_size, c.num_heads, c.mlp_hidden_size, c.qk_norm) for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.hidden_size, eps=1e-6, elementwise_affine=False)
        self.to_logits = nn.Linear(c.hidden_size, c.codebook_size)
        self._initialise()
        self.head = DiffusionHead(c.latent_channels, c.hidden_size, c.head_width, c.head_depth)

    def forward(
        self,
        ids: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        unconditional: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> Output:
        """ids (B, N) int64 in 0..V (V = MASK), text_states (B, T, Dt) float, text_mask (B, T) bool, unconditional (B,)
        bool -> Output. T may be shorter than ``config.text_length``. ``grid`` (h, w), h w = N, defaults to a square.

        Unconditional rows see ``null_text`` under the prompt's own mask: they depend on the prompt by its length alone.
        """
        grid = self.check_inputs(ids, text_states, text_mask, unconditional, grid)
        y = self.text_proj(self.text_input(text_states, unconditional))  # (B, T, D)
        x = self.token_embedding(ids) + self.positions(grid)
        for block in self.blocks:
            x = block(x, y, text_mask)
        return Output(logits=self.to_logits(self.norm(x)), hidden=x)

    def text_input(self, text_states: Tensor, unconditional: Tensor) -> Tensor:
        """(B, T, Dt): the states, replaced by ``null_text`` in unconditional rows."""
        null = self.null_text[: text_states.shape[1]]
        return torch.where(unconditional[:, None, None], null, text_states.to(null.dtype))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(h w, D): the stored table for its own grid, the formula for every other."""
        if tuple(grid) == self.config.grid:
            return self.position
        return sincos_positions(self.config.hidden_size, *grid).to(self.position)

    def check_inputs(
        self, ids: Tensor, text_states: Tensor, text_mask: Tensor, unconditional: Tensor, grid: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Raises ``ValueError`` for what does not fit; returns the grid."""
        c = self.config
        check_ids("ids", ids, (None, None), c.codebook_size + 1)
        batch, tokens = ids.shape
        check_text(text_states, text_mask, batch, c)
        check_tensor("unconditional", unconditional, (batch,))
        if unconditional.dtype != torch.bool:
            raise ValueError(f"unconditional must be bool, got {unconditional.dtype}")
        return check_grid(grid, tokens)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for layer in (self.text_proj.fc1, self.text_proj.fc2):
            nn.init.normal_(layer.weight, std=0.02)


def check_text(text_states: Tensor, text_mask: Tensor, batch: int | None, config: DCARConfig) -> None:
    """``ValueError`` unless text_states is (batch, T, Dt) float and text_mask (batch, T) bool, T <= text_length."""
    check_tensor("text_states", text_states, (batch, None, config.text_dim), floating=True)
    length = text_states.shape[1]
    if not 1 <= length <= config.text_length:
        raise ValueError(f"text_states must have 1..{config.text_length} positions, got {length}")
    check_tensor("text_mask", text_mask, (text_states.shape[0], length))
    if text_mask.dtype != torch.bool:
        raise ValueError(f"text_mask must be bool, got {text_mask.dtype}")


def check_grid(grid: tuple[int, int] | None, tokens: int | None) -> tuple[int, int]:
    """The (h, w) grid of ``tokens`` positions (None: any number); grid None means the square one."""
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"grid must be given: {tokens} tokens are no square")
        return side, side
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(type(n) is int and n > 0 for n in grid):
        raise ValueError(f"grid must be two positive integers (h, w), got {grid!r}")
    if tokens is not None and grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must multiply to {tokens} tokens, got {grid!r}")
    return grid[0], grid[1]
