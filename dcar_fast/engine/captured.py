"""Text encoder and decoder in CUDA graphs: what stands before and after the sampler, free of the cost of launching."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.engine import buckets
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.engine.graph import GraphedFunction
from dcar_fast.engine.pack import packed
from dcar_fast.models.text_encoder import TextEncoder, TextStates, text_states, upload
from dcar_fast.models.tokenizer import DCHT

logger = logging.getLogger(__name__)


def captures(device: torch.device) -> bool:
    """Whether there are graphs on this device."""
    return device.type == "cuda"


@torch.no_grad()
def encode_text(encoder: TextEncoder, prompts: Sequence[str]) -> TextStates:
    """``encoder(prompts)``; on a GPU in a graph."""
    if not captures(encoder.device):
        return encoder(prompts)
    graphed = packed(encoder, "graphs", _graphed_text)
    ids, mask, lengths = encoder.prepare(prompts)
    more = buckets.length_bucket(ids.shape[1], encoder.config.max_length) - ids.shape[1]
    ids, mask = F.pad(ids, (0, more)), F.pad(mask, (0, more))  # pads that are not attended, like all others

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        return graphed({"ids": ids, "mask": mask})[0]

    return text_states(*(upload(t, encoder.device) for t in (ids, mask)), lengths, mask, encode)


@torch.no_grad()
def decode_tokens(tokenizer: DCHT, ids: Tensor, residual: Tensor) -> Tensor:
    """``FastDecoder(tokenizer).decode_tokens(ids (B, h, w), residual (B, h w, C))``; on a GPU in a graph.

    Where there is no memory for a graph, the decoder does what it can without: fewer images at a time, then tiles.
    """
    if not captures(ids.device):
        return FastDecoder(tokenizer).decode_tokens(ids, residual)
    graphed = packed(tokenizer, "graphs", _graphed_decoder)
    if ids.shape in graphed.too_large:
        return FastDecoder(tokenizer).decode_tokens(ids, residual)
    try:
        return graphed({"ids": ids, "residual": residual})[0]
    except torch.OutOfMemoryError as error:
        shortage = str(error)
    graphed.too_large.add(ids.shape)  # every further try would drop all other graphs of the GPU
    logger.warning("decoding %d images without a CUDA graph from now on: %s", len(ids), shortage)
    return FastDecoder(tokenizer).decode_tokens(ids, residual)


def _graphed_text(encoder: TextEncoder) -> GraphedFunction:
    module = weakref.ref(encoder)  # what is packed must not keep the module alive

    def encode(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (_alive(module).encode(inputs["ids"], inputs["mask"]),)

    return GraphedFunction("the text encoder", encode, encoder.device)


def _graphed_decoder(tokenizer: DCHT) -> GraphedFunction:
    module = weakref.ref(tokenizer)

    def decode(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (FastDecoder(_alive(module)).decode_tokens(inputs["ids"], inputs["residual"]),)

    return GraphedFunction("the decoder", decode, tokenizer.quantizer.embedding.weight.device)


def _alive(module: weakref.ref):
    found = module()
    if found is None:
        raise RuntimeError("the module that was captured is gone")
    return found
