"""FLOPs and bytes of every stage, from the configuration alone.

Conventions, those of ``torch.utils.flop_counter``: matrix products, convolutions and the two products of attention
count, a multiply-add is 2 FLOPs; everything elementwise is free. Bytes are what these operations must move when each
reads its operands from memory once and writes its result once; biases, norms and elementwise operations are taken to
ride along. Fusing two products, or operands that stay in cache, can go below the bytes, never below the FLOPs.

The look-up of the nearest codes is no matrix product in the reference and 0.01 % of the encoder's work: not counted.
Every function describes the reference path: text states cut to the longest prompt, keys and values recomputed in every
forward, logits for all positions. A stage is a list of :class:`Op`; ``flops``, ``moved`` and ``floor`` sum it up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig, SamplingConfig, TextEncoderConfig
from dcar_fast.reference.diffusion import kept_timesteps
from dcar_fast.sampling.schedules import head_guidance, plan

ATTENTION_DIM = 32  # channels per head of the tokenizer's ReLU attention
TIMESTEP_DIM = 256  # features of the timestep embedding


@dataclass(frozen=True)
class Op:
    """One matrix product, convolution or attention, executed ``count`` times.

    flops: per execution. weights: elements of parameters read per execution. activations: elements of all other
    operands read and of the result written, per execution.
    """

    name: str
    flops: int
    weights: int
    activations: int
    count: int = 1


def linear(name: str, rows: int, inputs: int, outputs: int, count: int = 1) -> Op:
    """(rows, inputs) @ (inputs, outputs): 2 rows inputs outputs FLOPs."""
    return Op(name, 2 * rows * inputs * outputs, inputs * outputs, rows * (inputs + outputs), count)


def product(name: str, batch: int, rows: int, inner: int, columns: int, count: int = 1) -> Op:
    """``batch`` products (rows, inner) @ (inner, columns) of activations: 2 batch rows inner columns FLOPs."""
    elements = rows * inner + inner * columns + rows * columns
    return Op(name, 2 * batch * rows * inner * columns, 0, batch * elements, count)


def attention(name: str, batch: int, queries: int, keys: int, width: int, count: int = 1) -> Op:
    """Softmax attention with heads that add up to ``width``: 4 batch queries keys width FLOPs, scores not in memory."""
    return Op(name, 4 * batch * queries * keys * width, 0, 2 * batch * (queries + keys) * width, count)


def convolution(
    name: str, pixels: int, inputs: int, outputs: int, kernel: int = 3, groups: int = 1, count: int = 1
) -> Op:
    """Stride 1 over ``pixels`` = batch * height * width: 2 pixels outputs (inputs / groups) kernel^2 FLOPs."""
    weights = outputs * (inputs // groups) * kernel**2
    return Op(name, 2 * pixels * weights, weights, pixels * (inputs + outputs), count)


def times(ops: Iterable[Op], count: int) -> list[Op]:
    """The operations executed ``count`` times as often; an empty list for 0."""
    return [replace(op, count=op.count * count) for op in ops] if count else []


def flops(ops: Iterable[Op]) -> int:
    """FLOPs of all executions."""
    return sum(op.flops * op.count for op in ops)


def moved(ops: Iterable[Op], element_size: int) -> int:
    """Bytes of all executions with ``element_size`` bytes per element (4 float32, 2 bfloat16 and float16)."""
    return sum((op.weights + op.activations) * op.count for op in ops) * element_size


def floor(ops: Iterable[Op], element_size: int, flops_per_s: float, bytes_per_s: float) -> float:
    """Seconds that the operations need at least, one after the other: sum of max(FLOPs / rate, bytes / bandwidth)."""
    return sum(
        op.count * max(op.flops / flops_per_s, (op.weights + op.activations) * element_size / bytes_per_s) for op in ops
    )


# ---- the text encoder


def text_encoder(config: TextEncoderConfig, batch: int, prompt_tokens: int) -> list[Op]:
    """A T5 encoder on ``batch`` prompts, the longest of ``prompt_tokens`` tokens.

    L positions: ``max_length`` if pads are attended, else the longest prompt. Per layer, with inner width i = heads *
    d_kv: 8 B L d i (q, k, v, output) + 4 B L^2 i (attention) + 4 B L d f (6 B L d f if gated).
    """
    length = config.max_length if config.attend_pads else prompt_tokens
    inner, rows = config.num_heads * config.d_kv, batch * length
    up = 2 if config.feed_forward_proj.startswith("gated") else 1
    layer = [
        linear("q, k, v", rows, config.d_model, inner, count=3),
        attention("attention", batch, length, length, inner),
        linear("output", rows, inner, config.d_model),
        linear("feed-forward up", rows, config.d_model, config.d_ff, count=up),
        linear("feed-forward down", rows, config.d_ff, config.d_model),
    ]
    return times(layer, config.num_layers)


# ---- the generator, per forward on ``rows`` sequences (2 B with the unconditional pass, B without)


def text_projection(config: DCARConfig, rows: int, prompt_tokens: int) -> list[Op]:
    """Text states (rows, T, Dt) to the keys and values of all layers: 2 rows T (Dt D + D^2 + layers 2 D^2)."""
    texts, width = rows * prompt_tokens, config.hidden_size
    return [
        linear("text fc1", texts, config.text_dim, width),
        linear("text fc2", texts, width, width),
        linear("cross keys, values", texts, width, 2 * width, count=config.num_layers),
    ]


def trunk(config: DCARConfig, rows: int, tokens: int, prompt_tokens: int) -> list[Op]:
    """The blocks on (rows, N) tokens, without the text's keys and values.

    Per layer, M the MLP width: 2 rows N (3 D^2 + D^2 + 2 D^2 + 2 D M) + 4 rows N (N + T) D.
    """
    positions, width = rows * tokens, config.hidden_size
    layer = [
        linear("self q, k, v", positions, width, 3 * width),
        attention("self attention", rows, tokens, tokens, width),
        linear("self output", positions, width, width),
        linear("cross q", positions, width, width),
        attention("cross attention", rows, tokens, prompt_tokens, width),
        linear("cross output", positions, width, width),
        linear("mlp fc1", positions, width, config.mlp_hidden_size),
        linear("mlp fc2", positions, config.mlp_hidden_size, width),
    ]
    return times(layer, config.num_layers)


def logits(config: DCARConfig, rows: int, tokens: int) -> list[Op]:
    """(rows, N, D) to logits over V codes: 2 rows N D V."""
    return [linear("logits", rows * tokens, config.hidden_size, config.codebook_size)]


def diffusion_head(config: DCARConfig, rows: int) -> list[Op]:
    """One call of the head's network for ``rows`` residuals (2 B N under guidance).

    2 rows (256 w + w^2 + D w + C w + depth (2 w^2 + 3 w^2) + 2 w^2 + 2 w C), w the head's width.
    """
    width, channels = config.head_width, config.latent_channels
    return [
        linear("timestep fc1", rows, TIMESTEP_DIM, width),
        linear("timestep fc2", rows, width, width),
        linear("condition", rows, config.hidden_size, width),
        linear("input", rows, channels, width),
        linear("modulation", rows, width, 3 * width, count=config.head_depth),
        linear("mlp", rows, width, width, count=2 * config.head_depth),
        linear("final modulation", rows, width, 2 * width),
        linear("output", rows, width, 2 * channels),
    ]


# ---- the tokenizer, on latent grids (height, width)


def decoder(config: DCHTConfig, batch: int, height: int, width: int) -> list[Op]:
    """(B, C, h, w) latents to images. Stage i works at 2^(last - i) times the latent resolution.

    3x3 convolutions: 18 pixels inputs outputs; see ``_block`` for the stages' blocks. Up-sampling convolves at the
    lower resolution to 4 times the channels.
    """
    last = len(config.widths) - 1
    latent = batch * height * width
    ops = [convolution("input", latent, config.latent_channels, config.widths[last])]
    for i in reversed(range(last + 1)):
        depth, channels, pixels = config.decoder_depths[i], config.widths[i], latent * 4 ** (last - i)
        if not depth:
            continue
        if i < last:
            ops.append(convolution(f"stage {i} up", pixels // 4, config.widths[i + 1], 4 * channels))
        ops += times(_block(config, i, batch, pixels // batch), depth)
    if config.decoder_depths[0]:
        return [*ops, convolution("output", latent * 4**last, config.widths[0], 3)]
    return [*ops, convolution("output", latent * 4 ** (last - 1), config.widths[1], 12)]


def encoder(config: DCHTConfig, batch: int, height: int, width: int) -> list[Op]:
    """Images of latent size (h, w) to (B, C, h, w), the mirror of :func:`decoder`; down-sampling convolves at the
    higher resolution to a quarter of the channels."""
    last = len(config.widths) - 1
    latent = batch * height * width
    if config.encoder_depths[0]:
        ops = [convolution("input", latent * 4**last, 3, config.widths[0])]
    else:
        ops = [convolution("input", latent * 4**last, 3, config.widths[1] // 4)]
    for i, (depth, channels) in enumerate(zip(config.encoder_depths, config.widths, strict=True)):
        pixels = latent * 4 ** (last - i)
        if not depth:
            continue
        ops += times(_block(config, i, batch, pixels // batch), depth)
        if i < last:
            ops.append(convolution(f"stage {i} down", pixels, channels, config.widths[i + 1] // 4))
    return [*ops, convolution("output", latent, config.widths[last], config.latent_channels)]


def _block(config: DCHTConfig, stage: int, batch: int, pixels: int) -> list[Op]:
    """One block of a stage on ``pixels`` = height * width per image, C channels, H = C / 32 heads.

    res: two 3x3 convolutions. efficientvit: 1x1 to 3C; ReLU attention, linear (2 products of 33 x 32 per pixel and
    head) or quadratic up to 32 pixels; 1x1; 1x1 to 8C; depthwise 3x3; 1x1 from 4C.
    """
    channels, area, name = config.widths[stage], batch * pixels, f"stage {stage}"
    if config.blocks[stage] == "res":
        return [convolution(f"{name} conv3x3", area, channels, channels, count=2)]
    heads, dim = batch * (channels // ATTENTION_DIM), ATTENTION_DIM
    if pixels > dim:
        attend = [
            product(f"{name} attention k v", heads, dim + 1, pixels, dim),
            product(f"{name} attention q", heads, dim + 1, dim, pixels),
        ]
    else:
        attend = [
            product(f"{name} attention q k", heads, pixels, dim, pixels),
            product(f"{name} attention v", heads, dim, pixels, pixels),
        ]
    return [
        convolution(f"{name} q, k, v", area, channels, 3 * channels, kernel=1),
        *attend,
        convolution(f"{name} attention output", area, channels, channels, kernel=1),
        convolution(f"{name} inverted", area, channels, 8 * channels, kernel=1),
        convolution(f"{name} depthwise", area, 8 * channels, 8 * channels, groups=8 * channels),
        convolution(f"{name} pointwise", area, 4 * channels, channels, kernel=1),
    ]


# ---- the whole way from prompts to images


def forwards(sampling: SamplingConfig) -> dict[int, int]:
    """{1: forwards on the conditional rows alone, 2: forwards with the unconditional rows} of one sampling run."""
    guided_head = head_guidance(sampling) != 1.0
    counts = {1: 0, 2: 0}
    for step in plan(sampling):
        last = step.index == sampling.num_steps - 1
        feeds_head = last and guided_head and not sampling.final_forward
        counts[2 if step.guidance is not None or feeds_head else 1] += 1
    if sampling.final_forward:
        counts[2 if guided_head else 1] += 1
    return counts


def generation(
    config: PipelineConfig,
    sampling: SamplingConfig | None = None,
    *,
    batch: int = 1,
    grid: tuple[int, int] | None = None,
    prompt_tokens: int = 64,
) -> dict[str, list[Op]]:
    """The reference path of ``batch`` images, by stage, in order of execution.

    Stages: "text" (encoder), "text_projection" (keys and values), "trunk" and "logits" (together the unmasking steps),
    "head" (all denoising steps), "decode". grid: (h, w) tokens, by default the generator's own; prompt_tokens: the
    longest prompt.
    """
    sampling, generator = sampling or SamplingConfig(), config.generator
    height, width = grid or generator.grid
    tokens = height * width
    stages: dict[str, list[Op]] = {"text": text_encoder(config.text, batch, prompt_tokens)}
    stages |= {"text_projection": [], "trunk": [], "logits": []}
    for repeats, count in forwards(sampling).items():
        rows = repeats * batch
        stages["text_projection"] += times(text_projection(generator, rows, prompt_tokens), count)
        stages["trunk"] += times(trunk(generator, rows, tokens, prompt_tokens), count)
        stages["logits"] += times(logits(generator, rows, tokens), count)
    rows = batch * tokens * (1 if head_guidance(sampling) == 1.0 else 2)
    stages["head"] = times(diffusion_head(generator, rows), len(kept_timesteps(generator.head_steps)))
    stages["decode"] = decoder(config.tokenizer, batch, height, width)
    return stages
