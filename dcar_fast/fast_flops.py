"""FLOPs and bytes of the fast sampler on fused ops, stage by stage: ``flops.generation`` without what it leaves out.

Steady state: what is kept between calls (the null text, the first unconditional pass) is there already. A prompt that
absorbs the cross-attention's projections counts as padded, see ``engine/fused_text.py``; graphs pad further.
"""

from __future__ import annotations

from dcar_fast import flops
from dcar_fast.config import DCARConfig, PipelineConfig, SamplingConfig
from dcar_fast.engine.fused_text import absorbs
from dcar_fast.flops import Op, linear, product, times
from dcar_fast.reference.diffusion import kept_timesteps
from dcar_fast.sampling.schedules import head_guidance, masked_counts, plan


def generation(
    config: PipelineConfig,
    sampling: SamplingConfig | None = None,
    *,
    batch: int = 1,
    grid: tuple[int, int] | None = None,
    prompt_tokens: int = 64,
) -> dict[str, list[Op]]:
    """``batch`` images without known tokens, by the stages of :func:`dcar_fast.flops.generation`."""
    sampling, c = sampling or SamplingConfig(), config.generator
    height, width = grid or c.grid
    tokens = height * width
    absorbed = absorbs(c.hidden_size, c.num_heads, prompt_tokens)
    guided_head = head_guidance(sampling) != 1.0
    table = masked_counts(sampling, tokens)[:, tokens].tolist()
    found: dict[str, list[Op]] = {
        "text": flops.text_encoder(config.text, batch, prompt_tokens),
        "text_projection": text_projection(c, batch, prompt_tokens, absorbed),
        "trunk": [],
        "logits": [],
    }
    for step, open_tokens in zip(plan(sampling), [tokens, *table], strict=False):
        first, last = step.index == 0, step.index == sampling.num_steps - 1
        feeds_head = last and not sampling.final_forward
        guided = step.guidance is not None or (feeds_head and guided_head)
        images = 2 * batch if guided and not first else batch  # the first unconditional pass is kept
        rows = tokens if feeds_head else open_tokens
        common = 1 if first else batch
        found["trunk"] += trunk(c, images, common, tokens, rows, prompt_tokens, absorbed)
        found["logits"] += flops.logits(c, batch, open_tokens)
    if sampling.final_forward:
        images = 2 * batch if guided_head else batch
        found["trunk"] += trunk(c, images, batch, tokens, tokens, prompt_tokens, absorbed)
    found["head"] = diffusion_head(c, batch * tokens, guided_head)
    found["decode"] = flops.decoder(config.tokenizer, batch, height, width)
    return found


def text_projection(config: DCARConfig, batch: int, prompt_tokens: int, absorbed: int | None) -> list[Op]:
    """Keys and values of all layers, once per prompt, and the absorbed projections."""
    length, width, layers = absorbed or prompt_tokens, config.hidden_size, config.num_layers
    texts = batch * length
    ops = [
        linear("text fc1", texts, config.text_dim, width),
        linear("text fc2", texts, width, width),
        linear("cross keys, values", texts, width, 2 * width * layers),
    ]
    if absorbed:
        heads, head = layers * config.num_heads, width // config.num_heads
        ops.append(product("absorbed keys, values", heads, texts, head, width, count=2))
        ops.append(product("absorbed key bias", heads, texts, head, 1))
    return ops


def trunk(
    config: DCARConfig, images: int, common: int, tokens: int, rows: int, prompt_tokens: int, absorbed: int | None
) -> list[Op]:
    """One forward. common: images of the first layer's self-attention, where branches and equal ids are one. rows: the
    positions that the last layer looks at after its self-attention."""
    ops: list[Op] = []
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        some = common if layer == 0 else images
        ops += _self_attention(config, some, tokens, rows if last else tokens)
        ops += _rest(config, images, rows if last else tokens, prompt_tokens, absorbed)
    return ops


def _self_attention(config: DCARConfig, images: int, tokens: int, rows: int) -> list[Op]:
    width = config.hidden_size
    return [
        linear("self q, k, v", images * tokens, width, 3 * width),
        flops.attention("self attention", images, tokens, tokens, width),
        linear("self output", images * rows, width, width),
    ]


def _rest(config: DCARConfig, images: int, rows: int, prompt_tokens: int, absorbed: int | None) -> list[Op]:
    width, hidden = config.hidden_size, config.mlp_hidden_size
    if absorbed:
        keys = config.num_heads * absorbed
        cross = [product("cross scores", images, rows, width, keys), product("cross output", images, rows, keys, width)]
    else:
        cross = [
            linear("cross q", images * rows, width, width),
            flops.attention("cross attention", images, rows, prompt_tokens, width),
            linear("cross output", images * rows, width, width),
        ]
    return [*cross, linear("mlp fc1", images * rows, width, hidden), linear("mlp fc2", images * rows, hidden, width)]


def diffusion_head(config: DCARConfig, rows: int, guided: bool) -> list[Op]:
    """All denoising steps for ``rows`` residuals; without the timesteps, whose embeddings are constants."""
    width, channels = config.head_width, config.latent_channels
    both = 2 * rows if guided else rows
    step = [
        linear("input", rows, channels, width),
        linear("modulation", both, width, 3 * width * config.head_depth + 2 * width),
        linear("mlp", both, width, width, count=2 * config.head_depth),
        linear("output", both, width, 2 * channels),
    ]
    condition = linear("condition", both, config.hidden_size, width)
    return [condition, *times(step, len(kept_timesteps(config.head_steps)))]
