"""Initial weights from another run: the same generator at another resolution (256 -> 512), or the released one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from dcar_fast.checkpoints import find_folder, load_folder, load_state, read_json
from dcar_fast.config import DCARConfig, TextEncoderConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder

FREE = ("num_tokens", "head_steps", "head_scale", "head_batch_multiplier")
"""Fields of DCARConfig that no weight depends on."""


def load_initial(folder_or_hub_id: str | Path, config: DCARConfig) -> tuple[DCAR, TextEncoder]:
    """The generator of a pipeline folder as one of ``config``, and the folder's text encoder; float32, on the CPU.

    All weights are taken over. The table of positions is the stored one for the stored grid, else the formula's, which
    covers the same 0..16 range on every grid. The folder is one that training exported or ``dcar-fast convert`` wrote.
    ``ValueError`` names the fields of the configuration that differ in more than the resolution and the head's sampling
    settings.
    """
    folder = find_folder(folder_or_hub_id)
    parts, found, trained = load_folder(folder)
    if not trained:
        raise ValueError(f"initial: {folder} holds untrained weights")
    check_same_weights(found.generator, config, str(folder))
    with torch.random.fork_rng(devices=[]):  # random weights that are replaced
        generator = DCAR(config)
    state = parts["generator"].state_dict()
    if config.num_tokens != found.generator.num_tokens:
        state["position"] = generator.position
    load_state(generator, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    return generator, parts["text_encoder"].float()


def check_same_weights(found: DCARConfig, wanted: DCARConfig, source: str) -> None:
    """``ValueError`` unless the two configurations have the same weights."""
    names = [f.name for f in fields(DCARConfig) if f.name not in FREE]
    different = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if different:
        listed = ", ".join(
            f"{name} {getattr(found, name)!r} instead of {getattr(wanted, name)!r}" for name in different
        )
        raise ValueError(f"initial: {source} holds another generator: {listed}")


def load_text_encoder(folder_or_hub_id: str | Path, max_length: int) -> TextEncoder:
    """A text encoder to be kept frozen: of one of our pipeline folders, or a T5 encoder that transformers reads."""
    settings = Path(folder_or_hub_id) / "config.json"
    if settings.is_file() and "format" in read_json(settings):
        parts, config, _ = load_folder(folder_or_hub_id)
        if config.text.max_length != max_length:
            raise ValueError(
                f"text_encoder: {folder_or_hub_id} is for {config.text.max_length} tokens, not {max_length}"
            )
        return parts["text_encoder"].float()
    return TextEncoder.from_t5(folder_or_hub_id, max_length=max_length)


def check_byte_encoder(config: TextEncoderConfig, source: str) -> None:
    """``ValueError`` unless the encoder is one on bytes, the only kind that is trained jointly."""
    if config.tokenizer != "bytes":
        raise ValueError(
            f"text_encoder must name a folder or hub id: {source} has a T5 vocabulary, and only encoders on bytes are "
            "trained with the generator"
        )
