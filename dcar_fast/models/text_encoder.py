"""Text encoders: a T5 encoder as the released model calls it, or a small one on bytes that ships in our checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.config import TextEncoderConfig

log = logging.getLogger(__name__)

TOKENISED_AT_ONCE = 1024  # prompts, when only their lengths are kept

T5_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)


@dataclass(frozen=True)
class TextStates:
    """states (B, T, Dt) and mask (B, T) bool (True = a token of the prompt); T is the batch's longest prompt.

    lengths: how many True each row of the mask starts with and has, known without asking the device; None if a row has
    a hole (a pad written inside a prompt) or nobody counted.
    """

    states: Tensor
    mask: Tensor
    lengths: tuple[int, ...] | None = None


class TextEncoder(nn.Module):
    """Prompts -> last hidden states of a T5 encoder.

    With ``config.attend_pads`` (released behaviour) prompts are padded to ``max_length`` and T5 sees no attention mask:
    pads are attended inside T5, so all positions must be computed. Without it pads are masked and not even computed.
    Either way the states are cut to the longest prompt of the batch: positions outside the mask are never looked at.
    """

    def __init__(
        self, config: TextEncoderConfig | None = None, tokenizer: Any = None, t5: nn.Module | None = None
    ) -> None:
        """tokenizer: a transformers tokenizer; needed for "t5", made here for "bytes" (ByT5 needs no files).

        t5: the T5EncoderModel to use instead of a new one with random weights.
        """
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.config = c = config or TextEncoderConfig()
        if tokenizer is None:
            if c.tokenizer != "bytes":
                raise ValueError("tokenizer is needed for a TextEncoder with T5's own vocabulary")
            from transformers import ByT5Tokenizer

            tokenizer = ByT5Tokenizer()
        self.tokenizer = tokenizer
        self.t5 = t5 or T5EncoderModel(T5Config(**{name: getattr(c, name) for name in T5_FIELDS})).eval()

    @classmethod
    def from_t5(cls, folder_or_hub_id: str | Path = "google-t5/t5-base", max_length: int = 300) -> TextEncoder:
        """The released text encoder: a T5 encoder and its tokenizer, read by transformers."""
        from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

        source = str(folder_or_hub_id)
        try:
            settings = AutoConfig.from_pretrained(source)
            if settings.model_type != "t5":
                raise ValueError(f"its model_type is {settings.model_type!r}")
            tokenizer = AutoTokenizer.from_pretrained(source)
            if tokenizer.unk_token_id in tokenizer("a").input_ids:  # what is made up without a vocabulary file
                raise ValueError("its tokenizer knows no letters: tokenizer.json or spiece.model is missing")
            t5, found = T5EncoderModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
            if found["missing_keys"]:
                raise ValueError(f"missing tensors: {sorted(found['missing_keys'])}")
        except Exception as error:  # whatever missing, damaged or foreign files make transformers raise
            raise ValueError(f"text encoder: {source!r} holds no T5 encoder and tokenizer ({error})") from error
        sizes = {name: getattr(t5.config, name) for name in T5_FIELDS}
        return cls(TextEncoderConfig("t5", max_length, attend_pads=True, **sizes), tokenizer, t5.eval())

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, max_length) int64 and mask (B, max_length) bool, on the CPU.

        Longer prompts are cut to ``max_length`` tokens (the end mark stays) with a warning. ``ValueError`` for an empty
        list and for anything but strings, see :func:`check_prompts`.
        """
        check_prompts(prompts)
        length = self.config.max_length
        untruncated = self.tokenizer(list(prompts), verbose=False).input_ids
        for prompt, tokens in zip(prompts, untruncated, strict=True):
            if len(tokens) > length:
                log.warning("a prompt has %d tokens and is cut to %d: %.60r...", len(tokens), length, prompt)
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return encoded.input_ids, encoded.input_ids != self.tokenizer.pad_token_id

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt will have, the end mark included, at most ``max_length``; warns of nothing."""
        check_prompts(prompts)
        counts: list[int] = []
        for start in range(0, len(prompts), TOKENISED_AT_ONCE):
            tokens = self.tokenizer(list(prompts[start : start + TOKENISED_AT_ONCE]), verbose=False).input_ids
            counts += (min(len(row), self.config.max_length) for row in tokens)
        return counts

    def prepare(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
        """ids (B, L) int64 and mask (B, L) bool on the CPU as :meth:`encode` takes them, and the lengths of TextStates.

        L is ``max_length`` where pads are attended, else the longest prompt.
        """
        ids, mask = self.tokenize(prompts)
        counts = mask.sum(dim=1)
        last = (torch.arange(1, mask.shape[1] + 1) * mask).amax(dim=1)  # a pad may also be written inside a prompt
        lengths = tuple(counts.tolist()) if torch.equal(counts, last) else None
        if self.config.attend_pads:
            return ids, mask, lengths
        longest = max(int(last.max()), 1)
        return ids[:, :longest], mask[:, :longest], lengths

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64 and mask (B, L) bool -> states (B, L, Dt)."""
        # transformers takes "no mask" for "attend everywhere", which is what the released model relies on
        attended = None if self.config.attend_pads else mask.long()
        return self.t5(input_ids=ids, attention_mask=attended).last_hidden_state

    def forward(self, prompts: Sequence[str]) -> TextStates:
        """Prompts (B strings) -> TextStates on the encoder's device and in its dtype, without waiting for it."""
        ids, mask, lengths = self.prepare(prompts)
        return text_states(*(upload(t, self.device) for t in (ids, mask)), lengths, mask, self.encode)

    @property
    def device(self) -> torch.device:
        return self.t5.shared.weight.device


def text_states(
    ids: Tensor,
    mask: Tensor,
    lengths: tuple[int, ...] | None,
    mask_here: Tensor,
    encode: Callable[[Tensor, Tensor], Tensor],
) -> TextStates:
    """What ``encode`` makes of ids and mask (B, L), cut to the longest prompt; ``mask_here`` is the mask on the CPU."""
    longest = max(1, int((torch.arange(1, mask_here.shape[1] + 1) * mask_here).max()))
    return TextStates(encode(ids, mask)[:, :longest], mask[:, :longest], lengths)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def check_prompts(prompts: Sequence[str]) -> None:
    """``ValueError`` unless ``prompts`` is a sequence of at least one string."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a list of strings, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one string, got an empty list")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}] must be a string, got {type(prompt).__name__}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts[{i}] is no Unicode text: {error.reason}") from error
