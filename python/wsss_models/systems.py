"""The systems by name, and their settings from the command line and from files."""

from __future__ import annotations

import ast
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

SYSTEMS = ("classifier", "affinitynet", "irnet", "sccam", "puzzlecam", "vwe", "mcic", "deeplab")
# What refines CAMs, beside the methods of refine_cams:
TRAINED = ("affinitynet", "irnet")  # a network of its own, whose walk gives labels at once
ONE_STAGE = ("mcic",)  # a network that segments itself, and labels pictures of known classes


def system(name: str) -> ModuleType:
    """The module of a system: Config, PRESETS, Model.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}{_suggestion(name, SYSTEMS)}, got {name!r}")
    return importlib.import_module(f"wsss_models.{name}")


def preset(name: str, which: str = "published") -> Any:
    """The Config of a preset.

    Raises:
        ValueError: no such system or preset.
    """
    presets = system(name).PRESETS
    if which not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} for {name}, got {which!r}")
    return presets[which]


def with_settings(config: Any, settings: Iterable[str]) -> Any:
    """A Config with settings "name=value" changed, those of the recipe by their plain names too.

    Raises:
        ValueError: an unknown name (with the nearest known one) or a value of another type.

    Example:
        >>> with_settings(preset("classifier"), ["recipe.epochs=3", "crop=321"]).recipe.crop
        321
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"a setting must be name=value, got {setting!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        config = _with(config, name.strip(), value)
    return config


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """A Config from what `asdict` made of one, lists (JSON) for tuples.

    Raises:
        ValueError: an unknown name or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"settings must be {', '.join(known)}{_suggestion(name, known)}, got {name!r}")
    done = {
        name: from_dict(hints[name], value) if is_dataclass(hints[name]) else _typed(name, value, hints[name])
        for name, value in values.items()
    }
    return cls(**done)


def as_dict(config: Any) -> dict[str, Any]:
    return asdict(config)


def _with(config: Any, name: str, value: Any) -> Any:
    own = [f.name for f in fields(config)]
    hints = typing.get_type_hints(type(config))
    first, _, rest = name.partition(".")
    if rest and first in own and is_dataclass(hints[first]):
        return replace(config, **{first: _with(getattr(config, first), rest, value)})
    if not rest and first in own and not is_dataclass(hints[first]):
        return replace(config, **{first: _typed(name, value, hints[first])})
    recipe = [f.name for f in fields(config.recipe)] if hasattr(config, "recipe") else []
    if name in recipe:
        return replace(config, recipe=_with(config.recipe, name, value))
    known = sorted({*own, *recipe} - {"recipe"})
    raise ValueError(f"a setting must be one of {', '.join(known)}{_suggestion(name, known)}, got {name!r}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its type says: whole numbers do for floating point, lists for tuples."""
    for choice in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        items = typing.get_args(choice)
        if typing.get_origin(choice) is tuple and isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                return tuple(_typed(name, item, items[0]) for item in value)
            if len(items) == len(value):
                return tuple(_typed(name, item, kind) for item, kind in zip(value, items, strict=True))
        elif choice is types.NoneType and value is None:
            return None
        elif choice is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif choice in (int, str, bool) and type(value) is choice:
            return value
    expected = getattr(hint, "__name__", None) if not typing.get_args(hint) else str(hint)
    raise ValueError(f"{name} must be {expected or hint}, got {value!r}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
