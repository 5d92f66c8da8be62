"""From the settings of ``dcar-fast train-tokenizer`` to the task: the tokenizer is made or loaded, and checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcar_fast.checkpoints import read_tokenizer
from dcar_fast.config import DCHTConfig, preset
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.codebook import merge_codes
from dcar_fast.training.data.loader import make_loader, random_access_loader
from dcar_fast.training.data.split import Split
from dcar_fast.training.discriminator import smallest_side
from dcar_fast.training.settings import DataSettings, TokenizerTraining
from dcar_fast.training.tokenizer import DISCRIMINATOR, TOKENIZER, TokenizerTask

if TYPE_CHECKING:
    from dcar_fast.training.loop import Report

log = logging.getLogger(__name__)

AT_ONCE = 16  # pictures decoded together while an exported tokenizer is measured


def train_tokenizer(settings: TokenizerTraining) -> Report:
    """Trains one stage, from the newest checkpoint in ``settings.run.output`` if there is one; see
    :func:`make_tokenizer_task` and :func:`dcar_fast.training.loop.train`. ``run.output``/model is what the next stage
    takes as ``initial``."""
    from dcar_fast.training.loop import train

    task, loaders = make_tokenizer_task(settings), partial(make_loader, settings.data, captions=False)
    optimizers = {TOKENIZER: settings.optimizer, DISCRIMINATOR: settings.discriminator}
    return train(task, settings.run, {name: optimizers[name] for name in task.modules}, loaders, settings.to_dict())


def make_tokenizer_task(settings: TokenizerTraining) -> TokenizerTask:
    """Models on the CPU in float32; new weights depend on ``settings.run.seed`` alone.

    ``ValueError`` for a folder in ``initial`` that holds no tokenizer, another one than ``model`` or one of a stage
    that cannot come before, and for pictures that do not fit the tokenizer or the discriminator.
    """
    config = preset(settings.model).tokenizer if isinstance(settings.model, str) else settings.model
    _check_picture_size(settings, config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.run.seed)
        dcht, details = _initial(settings, config) if settings.initial else (DCHT(config), {"stage": "continuous"})
        # a codebook that has learnt something is not replaced; a released tokenizer's folder names no stage
        untrained = details.get("stage") == "continuous"
        wanted = settings.codebook_init == "data" and settings.stage == "discrete"
        if wanted and not untrained:
            log.warning("codebook_init 'data': the codes of %s stay as they are, they are trained", settings.initial)
        return TokenizerTask(
            settings,
            dcht,
            preview_images=_preview_images(settings),
            measured=partial(pictures, settings.data, settings.residual_std_examples),
            fill_codebook=wanted and untrained,
        )


def pictures(data: DataSettings, examples: int) -> Iterator[Tensor]:
    """``examples`` pictures in batches (B, 3, H, W) uint8: of combinations that training never sees for "shapes", else
    the first of the data."""
    size = min(AT_ONCE, examples)
    if data.kind == "shapes":
        from dcar_fast.training.shapes import ShapesSource

        source = ShapesSource(data.size, data.seed, held_out=True, variety=data.variety)
        batches = random_access_loader(source, Split(size), data.kind, 0, 0, None)
    else:
        batches = make_loader(data, batch_size=size, captions=False)
    with batches:
        for start in range(0, examples, size):
            yield next(batches).images[: examples - start]


def _preview_images(settings: TokenizerTraining) -> Tensor:
    count, size = settings.preview_examples, settings.data.size
    parts = list(pictures(settings.data, count)) if count and settings.run.preview_every else []
    return torch.cat(parts) if parts else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _initial(settings: TokenizerTraining, config: DCHTConfig) -> tuple[DCHT, dict[str, Any]]:
    """The tokenizer to go on with, and what its folder tells of it."""
    dcht, details = read_tokenizer(settings.initial)
    ours, theirs = config.to_dict(), dcht.config.to_dict()
    differing = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise ValueError(f"initial: {settings.initial} holds another tokenizer than model: {'; '.join(differing)}")
    if settings.stage == "alternate" and details.get("stage") == "continuous":
        raise ValueError(
            f"initial: stage 'alternate' needs trained codes, {settings.initial} is of stage 'continuous'; train stage "
            "'discrete' first"
        )
    dcht = dcht.float()
    if settings.merge_codes:
        left = merge_codes(dcht.quantizer.embedding.weight, settings.merge_codes)
        log.info("merge_codes %g: %d of %d codes are left", settings.merge_codes, left, config.codebook_size)
    return dcht, details


def _check_picture_size(settings: TokenizerTraining, config: DCHTConfig) -> None:
    size, compression = settings.data.size, config.compression
    if size % compression:
        raise ValueError(f"data.size must be a multiple of {compression}, the tokenizer's compression, got {size}")
    least = smallest_side(settings.discriminator_layers)
    if settings.gan_weight and size < least:
        layers = settings.discriminator_layers
        raise ValueError(f"data.size must be at least {least} for a discriminator of {layers} layers, got {size}")
