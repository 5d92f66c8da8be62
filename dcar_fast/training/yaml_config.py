"""Settings as YAML: the recipes that come with the package, and files of the same form.

A recipe holds the fields of :class:`TokenizerTraining` or :class:`GeneratorTraining` one to one.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from dcar_fast._files import write_atomically
from dcar_fast.training.launch import EXTRA
from dcar_fast.training.settings import GeneratorTraining, TokenizerTraining

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Settings = TypeVar("Settings", TokenizerTraining, GeneratorTraining)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = files("dcar_fast.training") / "recipes"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_recipe(path_or_name: str | Path, kind: type[Settings]) -> Settings:
    """The settings that a recipe's name or a YAML file stands for. ``ValueError`` names the file, and the full key
    (``run.steps``) of what is unknown, missing or not allowed in it."""
    name, path = str(path_or_name), Path(path_or_name)
    if name in recipe_names():
        text, source = (files("dcar_fast.training") / "recipes" / f"{name}.yaml").read_text("utf-8"), f"recipe {name}"
    elif path.is_file():
        try:
            text, source = path.read_text("utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file: {error}") from error
    else:
        raise ValueError(f"config must be a YAML file or one of {recipe_names()}, got {name!r}")
    try:
        return kind.from_dict(parse(text))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def parse(text: str) -> dict[str, Any]:
    """The mapping that a YAML document holds; ``ValueError`` for anything else, and for a key that comes twice."""
    yaml = _yaml()
    try:
        values = yaml.load(text, Loader=_loader(yaml))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"must hold a mapping of settings, got {values!r:.80}")
    return values


def dump(settings: TokenizerTraining | GeneratorTraining) -> str:
    """YAML that :func:`load_recipe` reads back as equal settings."""
    return _yaml().safe_dump(_plain(settings.to_dict()), sort_keys=False, allow_unicode=True, width=120)


def save_recipe(settings: TokenizerTraining | GeneratorTraining, path: Path) -> None:
    """Writes :func:`dump` to a file, atomically."""
    text = dump(settings)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _plain(value: Any) -> Any:
    """Tuples as lists, which is all that YAML has."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(EXTRA.format(error)) from error
    return yaml


def _loader(yaml: Any) -> type:
    """SafeLoader that refuses a key that comes twice, and reads 1e-4 as a number (YAML 1.2; PyYAML asks for 1.0e-4)."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    return Loader
