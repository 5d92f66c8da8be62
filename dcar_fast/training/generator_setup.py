"""From the settings of ``dcar-fast train-generator`` to the task: models are made or loaded, and checked to fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from dcar_fast.checkpoints import load_tokenizer
from dcar_fast.config import DCARConfig, DCHTConfig, TextEncoderConfig, preset
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.cache import text_fingerprint, tokenizer_fingerprint
from dcar_fast.training.continuation import check_byte_encoder, load_initial, load_text_encoder
from dcar_fast.training.data.cached import CachedSource
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.data.loader import make_loader
from dcar_fast.training.generator import MODULE, GeneratorTask
from dcar_fast.training.settings import DataSettings, GeneratorTraining

if TYPE_CHECKING:
    from dcar_fast.training.loop import Report

CALIBRATION_BATCH = 32  # pictures encoded together while the residual scale is measured


def train_generator(settings: GeneratorTraining) -> Report:
    """Trains, from the newest checkpoint in ``settings.run.output`` if there is one; see :func:`make_generator_task`
    and :func:`dcar_fast.training.loop.train`."""
    from dcar_fast.training.loop import train

    task, loaders = make_generator_task(settings), partial(make_loader, settings.data)
    return train(task, settings.run, {MODULE: settings.optimizer}, loaders, settings.to_dict())


def make_generator_task(settings: GeneratorTraining) -> GeneratorTask:
    """Models on the CPU in float32; new weights depend on ``settings.run.seed`` alone.

    ``ValueError`` for folders that hold no model, and for a tokenizer, text encoder, initial generator or cache that
    does not fit ``settings.model`` and ``settings.data``.
    """
    tokenizer = load_tokenizer(settings.tokenizer).float()
    config, text = model_configs(settings)
    check_picture_size(settings.data, config, tokenizer.config)
    joint = not settings.text_encoder
    if joint:
        check_byte_encoder(text, f"model {settings.model!r:.80}")
    frozen = None if joint else load_text_encoder(settings.text_encoder, config.text_length)
    generator, encoder = new_models(settings, config, text if joint else None)
    if settings.initial:
        generator, found = load_initial(settings.initial, config)
        if joint:
            check_byte_encoder(found.config, f"initial {settings.initial}")
            if found.config != text:
                raise ValueError(f"initial: the text encoder of {settings.initial} is {found.config}, not {text}")
            encoder = found
    encoder = frozen or encoder
    if settings.data.kind == "cache":
        settings = with_cache(settings, config, tokenizer, None if joint else encoder)
    calibration = partial(calibration_batches, settings.data, settings.residual_examples)
    return GeneratorTask(settings, tokenizer, generator, encoder, joint=joint, calibration=calibration)


def model_configs(settings: GeneratorTraining) -> tuple[DCARConfig, TextEncoderConfig]:
    """The generator's and the text encoder's configuration that ``settings.model`` stands for."""
    if isinstance(settings.model, str):
        found = preset(settings.model)
        return found.generator, found.text
    return settings.model.generator, settings.model.text


def new_models(
    settings: GeneratorTraining, config: DCARConfig, text: TextEncoderConfig | None
) -> tuple[DCAR, TextEncoder | None]:
    """A generator and, for a ``text`` configuration, a text encoder; torch's global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.run.seed)
        generator = visible_inputs(DCAR(config))
        return generator, None if text is None else TextEncoder(text)


@torch.no_grad()
def visible_inputs(generator: DCAR) -> DCAR:
    """Token embeddings as large as the positions they are added to (root mean square 1 / sqrt 2), and a projection of
    the text that about keeps its variance, in place.

    With a standard deviation of 0.02 both are hardly seen beside positions and queries at first: a model that is
    trained for hours, not weeks, then learns little of what its neighbours and the caption say.
    """
    torch.nn.init.normal_(generator.token_embedding.weight, std=math.sqrt(0.5))
    for layer in (generator.text_proj.fc1, generator.text_proj.fc2):
        torch.nn.init.xavier_uniform_(layer.weight)
    return generator


def check_picture_size(data: DataSettings, config: DCARConfig, tokenizer: DCHTConfig) -> None:
    """``ValueError`` unless a picture has as many tokens as the generator; caches are checked by their index."""
    side = config.grid[0] * tokenizer.compression
    if data.kind != "cache" and data.size != side:
        raise ValueError(
            f"data.size must be {side}: the model has {config.grid[0]} x {config.grid[1]} tokens of "
            f"{tokenizer.compression} pixels; got {data.size}"
        )


def with_cache(
    settings: GeneratorTraining, config: DCARConfig, tokenizer: DCHT, text_encoder: TextEncoder | None
) -> GeneratorTraining:
    """The settings with the cache's residual scale, unless they have one. ``ValueError`` for a cache of another
    tokenizer, another number of tokens, or with the states of another text encoder (None: it needs none)."""
    source = CachedSource(settings.data.path)
    index = source.index
    if index.grid != config.grid:
        raise ValueError(f"data.path: the cache {settings.data.path!r} has grids {index.grid}, the model {config.grid}")
    needs_states = text_encoder is not None and index.text_encoder is not None
    wanted = text_fingerprint(text_encoder) if needs_states else index.text_encoder
    source.check_made_by(tokenizer_fingerprint(tokenizer), wanted)
    if settings.residual_scale is not None:
        return settings
    if not index.residual_std > 0:
        raise ValueError(f"residual_scale must be given: all residuals of the cache {settings.data.path!r} are equal")
    return dataclasses.replace(settings, residual_scale=index.residual_std)


def calibration_batches(data: DataSettings, examples: int) -> Iterator[Batch]:
    """The first ``examples`` examples of the data, in batches."""
    batch_size = min(CALIBRATION_BATCH, examples)
    with make_loader(data, batch_size=batch_size) as batches:
        for start in range(0, examples, batch_size):
            batch = next(batches)
            count = min(batch_size, examples - start)
            cached = {name: values[:count] for name, values in batch.cached.items()}
            images = None if batch.images is None else batch.images[:count]
            yield Batch(batch.keys[:count], batch.captions[:count], images, cached)
