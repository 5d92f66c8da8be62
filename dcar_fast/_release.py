"""The released checkpoints' tensor names, translated to ours, and the configs their shapes imply."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dcar_fast.config import DCARConfig, DCHTConfig

RELEASED_HEAD_DIM = 72

# (pattern in our name, its replacement in the released name), applied in order
GENERATOR_NAMES = (
    (r"^position$", "pos_embed"),
    (r"^token_embedding\.", "x_embedder."),
    (r"^null_text$", "y_embedder.y_embedding"),
    (r"^text_proj\.", "y_embedder.y_proj."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"\.cross_attn\.(q|kv)\.", r".cross_attn.\1_linear."),
    (r"^to_logits\.", "final_layer.linear."),
    (r"^head\.", "diffloss.net."),
)
TOKENIZER_NAMES = (
    (r"^quantizer\.", "quantize."),
    (r"^encoder\.project_in\.", "encoder.project_in.conv."),
    (r"^encoder\.project_out\.", "encoder.project_out.main.op_list.0."),
    (r"^decoder\.project_in\.", "decoder.project_in.main."),
    (r"^decoder\.project_out\.", "decoder.project_out.op_list.2.conv."),
    (r"^decoder\.norm\.", "decoder.project_out.op_list.0."),
    (r"\.stages\.(\d+)\.(\d+)\.norm\.", r".stages.\1.\2.main.conv2.norm."),
    (r"\.stages\.(\d+)\.(\d+)\.(conv1|conv2|conv)\.", r".stages.\1.\2.main.\3.conv."),
    (r"\.attention\.(qkv|proj)\.", r".context_module.main.\1.conv."),
    (r"\.attention\.norm\.", ".context_module.main.proj.norm."),
    (r"\.mlp\.inverted\.", ".local_module.main.inverted_conv.conv."),
    (r"\.mlp\.depthwise\.", ".local_module.main.depth_conv.conv."),
    (r"\.mlp\.pointwise\.", ".local_module.main.point_conv.conv."),
    (r"\.mlp\.norm\.", ".local_module.main.point_conv.norm."),
    (r"\.stages\.(\d+)\.(\d+)\.", r".stages.\1.op_list.\2."),
)


def released_name(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The released checkpoint's name of our tensor ``name``."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def infer_generator_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> DCARConfig:
    """The config that tensors (released names) imply; what shapes cannot tell has the released values, or is given."""
    shape = _Shapes(state, "generator")
    hidden = shape("x_embedder.weight", 1)
    if num_heads is None and hidden % RELEASED_HEAD_DIM:
        raise ValueError(f"config must be given: hidden size {hidden} is no multiple of the released head size 72")
    return DCARConfig(
        codebook_size=shape("x_embedder.weight", 0) - 1,
        latent_channels=shape("diffloss.net.input_proj.weight", 1),
        num_tokens=shape("pos_embed", 1),
        hidden_size=hidden,
        num_layers=shape.count(r"^blocks\.(\d+)\."),
        num_heads=num_heads or hidden // RELEASED_HEAD_DIM,
        mlp_hidden_size=shape("blocks.0.mlp.fc1.weight", 0),
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        text_length=shape("y_embedder.y_embedding", 0),
        text_dim=shape("y_embedder.y_embedding", 1),
        head_width=shape("diffloss.net.input_proj.weight", 0),
        head_depth=shape.count(r"^diffloss\.net\.res_blocks\.(\d+)\."),
    )


def infer_tokenizer_config(state: Mapping[str, Tensor]) -> DCHTConfig:
    """The config that tensors (released names) imply. Activations are invisible in shapes: the released ones are SiLU,
    but ReLU in the decoder's residual stages. The width of an empty stage 0 is unused and takes the default."""
    shape = _Shapes(state, "tokenizer")
    stages = shape.count(r"^encoder\.stages\.(\d+)\.", empty={"0"})
    released = DCHTConfig()
    widths, blocks, depths, norms = [], [], {"encoder": [], "decoder": []}, {"encoder": [], "decoder": []}
    for i in range(stages):
        for side in depths:
            names = [n for n in state if n.startswith(f"{side}.stages.{i}.")]
            resampler = any(re.search(r"op_list\.\d+\.main\.conv\.conv\.weight$", n) for n in names)
            blocks_found = {m.group(1) for m in (re.search(r"\.op_list\.(\d+)\.", n) for n in names) if m}
            depths[side].append(len(blocks_found) - resampler)
            batch_norm = any(n.endswith("running_mean") for n in names) or (not names and i == 0 and side == "decoder")
            norms[side].append("batch_norm" if batch_norm else "layer_norm")
        vit = any(f".stages.{i}.op_list" in n and ".context_module." in n for n in state)
        blocks.append("efficientvit" if vit else "res")
        widths.append(_stage_width(state, i) or released.widths[0])
    return DCHTConfig(
        codebook_size=shape("quantize.embedding.weight", 0),
        latent_channels=shape("quantize.embedding.weight", 1),
        widths=tuple(widths),
        encoder_depths=tuple(depths["encoder"]),
        decoder_depths=tuple(depths["decoder"]),
        blocks=tuple(blocks),
        encoder_norm=norms["encoder"][-1],
        encoder_act=released.encoder_act,
        decoder_norms=tuple(norms["decoder"]),
        decoder_acts=tuple("relu" if block == "res" else "silu" for block in blocks),
    )


def _stage_width(state: Mapping[str, Tensor], stage: int) -> int | None:
    last_conv = r"(main\.conv2|local_module\.main\.point_conv)\.conv\.weight"
    pattern = rf"^(encoder|decoder)\.stages\.{stage}\.op_list\.\d+\.{last_conv}$"
    return next((tensor.shape[0] for name, tensor in state.items() if re.search(pattern, name)), None)


class _Shapes:
    """Sizes of tensors by name; what is missing is a ``ValueError`` that says what the checkpoint should be."""

    def __init__(self, state: Mapping[str, Tensor], kind: str) -> None:
        self.state, self.kind = state, kind

    def __call__(self, name: str, axis: int) -> int:
        if name not in self.state or self.state[name].dim() <= axis:
            raise ValueError(f"not a released DC-AR {self.kind}: {name!r} is missing or misshapen")
        return self.state[name].shape[axis]

    def count(self, pattern: str, empty: frozenset[str] | set[str] = frozenset()) -> int:
        """How many different numbers the pattern's group takes, or may leave out because they are empty.

        Not the largest plus one: a stray huge number must not build a huge model before it is found out.
        """
        found = {m.group(1) for m in (re.search(pattern, name) for name in self.state) if m}
        if not found:
            raise ValueError(f"not a released DC-AR {self.kind}: it has no tensors like {pattern}")
        return len(found | empty)
