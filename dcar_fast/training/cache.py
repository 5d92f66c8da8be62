"""``dcar-fast cache``: what the frozen tokenizer, and a frozen text encoder, make of a data source, kept as shards.

Training from the cache sees the very tokens and residuals that it would compute, without the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dcar_fast._inputs import check_device
from dcar_fast.bulk.folder import fingerprint
from dcar_fast.bulk.ranks import Rank
from dcar_fast.checkpoints import load_tokenizer
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.continuation import load_text_encoder
from dcar_fast.training.data.cache_writer import CacheWriter, remove_leftovers
from dcar_fast.training.data.cached import CacheIndex
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.data.folder import FolderSource
from dcar_fast.training.data.loader import make_loader, make_source
from dcar_fast.training.generator import encode_images
from dcar_fast.training.lock import only_writer
from dcar_fast.training.long_captions import SaidOnce
from dcar_fast.training.settings import DataSettings

log = logging.getLogger(__name__)


def make_cache(settings: CacheSettings) -> CacheIndex:
    """Loads the models and writes what of the cache is missing; its index.

    ``ValueError`` for folders that hold no model, for endless data without a number of examples, and for an output
    folder with a cache of other models or data, or that another process writes at this moment.
    """
    device = check_device(Rank().device(settings.device, torch.cuda.is_available()))
    count = settings.examples or folder_size(settings.data)
    tokenizer = load_tokenizer(settings.tokenizer).float().to(device)
    encoder = None
    if settings.text_encoder:
        encoder = load_text_encoder(settings.text_encoder, settings.text_length).to(device)
    with only_writer(settings.output):
        remove_leftovers(settings.output)
        return write_cache(settings, tokenizer, encoder, count, device)


def folder_size(data: DataSettings) -> int:
    """Pictures of a folder; ``ValueError`` for data that has no end."""
    source = make_source(data, data.seed) if data.kind == "folder" else None
    if not isinstance(source, FolderSource):
        raise ValueError(f"examples must be given with data.kind {data.kind!r}, which has no end of its own")
    return len(source)


def write_cache(
    settings: CacheSettings, tokenizer: DCHT, text_encoder: TextEncoder | None, count: int, device: torch.device
) -> CacheIndex:
    """Encodes until the cache has ``count`` examples, from where an earlier run stopped; its index.

    ``ValueError`` for a cache made with other models or data.
    """
    tokenizer.quantizer.lookup = vq_lookup
    for model in (tokenizer, text_encoder):
        if model is not None:
            model.eval().requires_grad_(False)
    # what the order of the examples depends on: workers decode, and tar shards are dealt out to them
    source = {**asdict(settings.data), "batch_size": settings.batch_size}
    if settings.data.kind != "shards":
        source.pop("workers", None)
    writer = CacheWriter(
        settings.output,
        tokenizer=tokenizer_fingerprint(tokenizer),
        codebook_size=tokenizer.config.codebook_size,
        text_encoder=None if text_encoder is None else text_fingerprint(text_encoder),
        data=source,
        residual_dtype=settings.residual_dtype,
        shard_size=settings.shard_size,
    )
    if writer.count >= count:
        return writer.finish()
    position = writer.index.position or None
    with (
        SaidOnce().applied(),
        make_loader(settings.data, batch_size=settings.batch_size, position=position) as batches,
        tqdm(total=count, initial=writer.count, unit=" images", disable=None) as bar,
    ):
        while writer.count < count:
            batch = next(batches)
            rows = encode_batch(batch, tokenizer, text_encoder, device)
            rows = {name: values[: count - writer.count] for name, values in rows.items()}
            if len(rows["keys"]):
                writer.add(**rows, position=batch.position)
            bar.update(len(rows["keys"]))
    return writer.finish()


@torch.no_grad()
def encode_batch(
    batch: Batch, tokenizer: DCHT, text_encoder: TextEncoder | None, device: torch.device
) -> dict[str, Any]:
    """The arguments of :meth:`CacheWriter.add`. Captions whose tokens hold a pad inside are left out with a warning: a
    cache keeps a length per caption."""
    ids, residual = encode_images(tokenizer, batch.images, device)
    rows: dict[str, Any] = {"keys": batch.keys, "captions": batch.captions, "ids": ids, "residual": residual}
    if text_encoder is None:
        return rows
    text = text_encoder(batch.captions)
    padding = text_encoder.config.max_length - text.mask.shape[1]
    mask = F.pad(text.mask, (0, padding))
    rows |= {"text_states": F.pad(text.states.float(), (0, 0, 0, padding)), "text_mask": mask}
    whole = ~(mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    return rows if bool(whole.all()) else dict(_selected(rows, whole.cpu()))


def _selected(rows: dict[str, Any], wanted: Tensor) -> Iterator[tuple[str, Any]]:
    numbers = wanted.nonzero()[:, 0].tolist()
    for i in (~wanted).nonzero()[:, 0].tolist():
        log.warning("%s is left out: its caption holds a pad: %.60r", rows["keys"][i], rows["captions"][i])
    for name, values in rows.items():
        yield name, values[numbers] if isinstance(values, Tensor) else [values[i] for i in numbers]


def tokenizer_fingerprint(tokenizer: DCHT) -> str:
    """Of what tokens and residuals are made with: encoder and codes. The decoder may be trained on."""
    return fingerprint([tokenizer.encoder, tokenizer.quantizer])


def text_fingerprint(text_encoder: TextEncoder) -> str:
    """Of the weights, and of how prompts become their input."""
    config = text_encoder.config
    return f"{fingerprint([text_encoder])}-{config.max_length}-{'pads' if config.attend_pads else 'masked'}"
