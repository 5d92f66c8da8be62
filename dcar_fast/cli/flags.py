"""Flags of nested settings: parsed without checks, checked afterwards.

The parser would report what nested settings refuse under names of its own; here the message names the flag.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any, get_type_hints

from dcar_fast.config import _Config
from dcar_fast.training.settings import _named


class Unchecked:
    """What :func:`unchecked` makes are of this class too. ``stands_for``: the settings' own class."""

    stands_for: type


def subclass(base: type, annotations: dict[str, Any], values: dict[str, Any], *also: type, **options: bool) -> Any:
    """A dataclass of the same name, module and description with other types of some fields."""
    inherited = {"__annotations__": annotations, "__doc__": base.__doc__, "__module__": base.__module__}
    return dataclass(**options)(type(base.__name__, (base, *also), {**inherited, **values}))


@lru_cache
def unchecked(kind: type, model: type | None) -> Any:
    """The settings ``kind``, and those that are fields of them, as classes that take any value. model: which of the
    types of the field ``model`` it is, where it has several, else None."""
    hints, annotations, values = get_type_hints(kind), {}, {}
    for f in fields(kind):
        wanted = model if f.name == "model" and model is not None else hints[f.name]
        nested = isinstance(wanted, type) and issubclass(wanted, _Config)
        if not nested and wanted is hints[f.name]:
            continue
        annotations[f.name] = unchecked(wanted, None) if nested else wanted
        if f.default_factory is not MISSING:
            values[f.name] = field(default_factory=lambda make=f.default_factory: as_unchecked(make()))
        elif f.default is not MISSING and isinstance(f.default, wanted):
            values[f.name] = f.default
    values |= {"stands_for": kind, "__post_init__": lambda self: None}
    return subclass(kind, annotations, values, Unchecked, frozen=True, kw_only=True)


def as_unchecked(settings: Any) -> Any:
    """The same values for the parser."""
    typed = unchecked(type(settings), _model_type(settings))
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return typed(**{name: as_unchecked(v) if isinstance(v, _Config) else v for name, v in values.items()})


def checked(flags: Any, path: str = "") -> Any:
    """The settings themselves; ``ValueError`` names the flag (``run.steps``) of what they refuse."""
    prefix = f"{path}." if path else ""
    values = {f.name: getattr(flags, f.name) for f in fields(flags)}
    made = {name: checked(v, prefix + name) if isinstance(v, Unchecked) else v for name, v in values.items()}
    return _named(lambda: flags.stands_for(**made), flags.stands_for.__name__, prefix)


def _model_type(settings: Any) -> type | None:
    """The type of the field ``model`` where the settings allow several."""
    hint = get_type_hints(type(settings)).get("model")
    return None if hint is None or isinstance(hint, type) else type(settings.model)
