"""Commands that train the models, and cache what the generator's training needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg, subcommand

from dcar_fast.cli.flags import as_unchecked, checked, subclass, unchecked
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.settings import GeneratorTraining, TokenizerTraining

CONFIG = "--config"


@dataclass(kw_only=True)
class _Training:
    config: str = ""
    """Name of a recipe that comes with the package, or a YAML file; its values are the defaults of all others."""
    settings: Any

    def run(self) -> None:
        logging.getLogger("dcar_fast.training").setLevel(logging.INFO)
        self.train(checked(self.settings))


class TrainTokenizer(_Training):
    """Train a stage of the tokenizer.

    On several GPUs: accelerate launch -m dcar_fast train-tokenizer ..., or torchrun in its place.
    """

    kind = TokenizerTraining

    def train(self, settings: TokenizerTraining) -> None:
        from dcar_fast.training.tokenizer_setup import train_tokenizer

        train_tokenizer(settings)


class TrainGenerator(_Training):
    """Train the generator on pictures with captions, or on a cache of tokens.

    On several GPUs: accelerate launch -m dcar_fast train-generator ..., or torchrun in its place.
    """

    kind = GeneratorTraining

    def train(self, settings: GeneratorTraining) -> None:
        from dcar_fast.training.generator_setup import train_generator

        train_generator(settings)


@dataclass(kw_only=True)
class Cache:
    """Keep what the tokenizer, and a frozen text encoder, make of pictures, for train-generator."""

    settings: Annotated[unchecked(CacheSettings, None), arg(name="")]

    def run(self) -> None:
        from dcar_fast.training.cache import make_cache

        settings = checked(self.settings)
        index = make_cache(settings)
        spread = f"residual standard deviation {index.residual_std:.6f}"
        print(f"{settings.output}: {index.count} examples, {spread}")


TRAININGS: dict[str, type[_Training]] = {"train-tokenizer": TrainTokenizer, "train-generator": TrainGenerator}


def training_commands(args: Sequence[str]) -> list[Any]:
    """The alternatives of the command line that train. The one that ``args`` ask for has the values of the recipe that
    follows --config as defaults. ``ValueError`` for a recipe that is not there, is no YAML, or does not fit."""
    found = []
    for name, command in TRAININGS.items():
        recipe = named_config(args[1:]) if args and args[0] == name else None
        if recipe is None:
            found.append(Annotated[_with_flags(command, str), subcommand(name)])
            continue
        from dcar_fast.training.yaml_config import load_recipe

        settings = load_recipe(recipe, command.kind)
        typed = _with_flags(command, type(settings.model))
        default = typed(config=recipe, settings=as_unchecked(settings))
        found.append(Annotated[typed, subcommand(name, default=default)])
    return found


def named_config(args: Sequence[str]) -> str | None:
    """What follows --config, or None; ``ValueError`` if nothing does."""
    for i, argument in enumerate(args):
        if argument.startswith(f"{CONFIG}="):
            return argument.removeprefix(f"{CONFIG}=")
        if argument == CONFIG:
            if i + 1 == len(args) or args[i + 1].startswith("-"):
                raise ValueError(f"{CONFIG} must be followed by a recipe's name or a YAML file")
            return args[i + 1]
    return None


def _with_flags(command: type[_Training], model: type) -> Any:
    """The command for a parser, with a field ``model`` of one type: tyro would make subcommands of the two that it has
    (a preset's name or a configuration)."""
    return subclass(command, {"settings": Annotated[unchecked(command.kind, model), arg(name="")]}, {}, kw_only=True)
