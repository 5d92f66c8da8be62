"""The released DC-AR generator's public behaviour, written anew: names of tensors, methods and arguments, the order of
its random draws, and its defects. What ``accelerate`` is given in tests, with the recorded weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden_vectors import released_state, settings
from tests.integrations.mar_family import HartDiffLoss


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    def __init__(self, tokens: int, inputs: int, width: int) -> None:
        super().__init__()
        self.y_proj = Mlp(inputs, width, width)
        self.register_buffer("y_embedding", nn.Parameter(torch.randn(tokens, inputs) / inputs**0.5))

    def forward(self, y: Tensor, drop: Tensor | float) -> Tensor:
        if isinstance(drop, Tensor) or drop > 0:
            dropped = torch.rand(len(y)) < drop  # a random number where the outcome is certain too
            y = torch.where(dropped.to(y.device)[:, None, None], self.y_embedding, y)
        return self.y_proj(y)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        k, v = self.kv_linear(y).chunk(2, dim=-1)
        return self.proj(attend(self.q_linear(x), k, v, self.heads, mask[:, None, None]))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, hidden, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(x, y, mask)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class Words:
    """A tokenizer of one id per letter."""

    pad_token_id = 0

    def __call__(self, text: str, padding: str, max_length: int, truncation: bool, return_tensors: str):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = [1 + ord(letter) % 31 for letter in text][:max_length]
        return SimpleNamespace(input_ids=torch.tensor([ids + [0] * (max_length - len(ids))]))


class ReleasedGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = SimpleNamespace(**settings("generator")["config"])
        self.image_seq_len, self.mask_token_id = c.num_tokens, c.codebook_size
        self.num_attention_heads, self.text_tokenizer_max_length = c.num_heads, c.text_length
        self.text_tokenizer = Words()
        self.text_encoder = (nn.Embedding(32, c.text_dim),)  # in a tuple: no part of the state
        self.x_embedder = nn.Embedding(c.codebook_size + 1, c.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.num_tokens, c.hidden_size), requires_grad=False)
        self.y_embedder = CaptionEmbedder(c.text_length, c.text_dim, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_heads, c.mlp_hidden_size) for _ in range(c.num_layers))
        self.final_layer = FinalLayer(c.hidden_size, c.codebook_size)
        sizes = {"target_channels": c.latent_channels, "z_channels": c.hidden_size}
        sizes |= {"depth": c.head_depth, "width": c.head_width, "num_sampling_steps": str(c.head_steps)}
        self.diffloss = HartDiffLoss(**sizes, vae_scale=c.head_scale)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.text_encoder[0](text), text != self.text_tokenizer.pad_token_id

    def forward(self, ids, condition=None, encoder_hidden_states=None, encoder_attention_mask=None, cond_drop_prob=0.1):
        x = self.x_embedder(ids) + self.pos_embed
        y = self.y_embedder(encoder_hidden_states, cond_drop_prob)
        for block in self.blocks:
            x = block(x, y, encoder_attention_mask)
        return self.final_layer(x), x, None

    @torch.no_grad()
    def generate(
        self,
        condition,
        init_image_tokens=None,
        init_residual_features=None,
        init_mask=None,
        guidance_scale=3.0,
        guidance_decay="constant",
        guidance_scale_pow=3.0,
        randomize_temperature=4.5,
        softmax_temperature_annealing=False,
        num_sample_steps=8,
    ):
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        longest = self.text_tokenizer_max_length
        tokens = [self.text_tokenizer(text, max_length=longest, **options).input_ids for text in condition]
        states, mask = self.encode_text(torch.cat(tokens))
        batch = len(states)
        ids = torch.full((batch, self.image_seq_len), self.mask_token_id)
        ids = ids if init_image_tokens is None else init_image_tokens
        weight = guidance_scale if guidance_decay == "constant" else 0.0
        for step in range(num_sample_steps):
            ratio = (step + 1) / num_sample_steps
            tau = randomize_temperature * (1 - ratio)
            if guidance_decay == "power-cosine":
                wave = 1 - math.cos((step / num_sample_steps) ** guidance_scale_pow * math.pi)
                weight = (guidance_scale - 1) * wave / 2 + 1
            if weight != 0:
                drop = torch.cat((torch.zeros(batch), torch.ones(batch)))
                both, _, _ = found = self.forward(
                    ids.repeat(2, 1), None, states.repeat(2, 1, 1), mask.repeat(2, 1), drop
                )
                conditional, unconditional = both.chunk(2)
                base = unconditional if guidance_decay == "power-cosine" else conditional
                logits, latents = base + weight * (conditional - unconditional), found[1]
            else:
                logits = self.forward(ids, None, states, mask, 0.0)[0]
            if softmax_temperature_annealing:
                logits = logits / (0.5 + 0.8 * (1 - ratio))
            sampled = noisy(logits, tau).argmax(dim=-1)
            confidence = logits.gather(-1, sampled[..., None])[..., 0]
            open_ = ids == self.mask_token_id
            sampled = torch.where(open_, sampled, ids)
            confidence = noisy(torch.where(open_, confidence, math.inf), tau)
            left = math.floor(self.image_seq_len * math.acos(ratio) * 2 / math.pi)
            left = max(1, min(int(open_[0].sum()) - 1, left))  # of the first row, for all of them
            least = confidence.sort(dim=-1).values[:, left - 1 : left]
            last = step == num_sample_steps - 1
            ids = sampled if last else torch.where(confidence <= least, self.mask_token_id, sampled)
            if guidance_decay == "linear":
                weight = ratio * guidance_scale
        residual = self.diffloss.sample(latents.flatten(0, 1), 1.0, weight).unflatten(0, latents.shape[:2])[:batch]
        if init_residual_features is not None:
            residual = torch.where(init_mask[..., None], init_residual_features, residual)
        return ids, residual


def noisy(logits: Tensor, tau: float) -> Tensor:
    u = torch.zeros_like(logits).uniform_(0, 1)
    return logits - tau * (-(u.clamp(min=1e-20).log())).clamp(min=1e-20).log()


def released_generator() -> ReleasedGenerator:
    """With the recorded weights."""
    torch.manual_seed(1)
    generator = ReleasedGenerator()
    generator.load_state_dict(released_state("generator"))
    return generator.eval()
