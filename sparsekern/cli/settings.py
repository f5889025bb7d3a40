"""A method's settings as a command line gives them: the common ones as options, any one as `--set NAME=VALUE`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from ..methods import METHODS, Method


def configured(name: str, options: Mapping[str, object], assignments: Sequence[str]) -> Method:
    """The method `name` with these settings, in its config's own types.

    What it has no setting for goes to the method inside it, gradual's criterion or sparsellm's solver; `solver.damping` always does.

    Args:
        options: setting -> value, from options of the same name with dashes.
        assignments: `NAME=VALUE`, read by the type of the config's field.

    Raises:
        ValueError, TypeError: no such method or setting, a value of another type, or one that the method refuses.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))}, got {name!r}")
    own = _types(METHODS[name])
    part = next((setting for setting, types in own.items() if Method in types), "")
    chosen = {f"--{setting.replace('_', '-')}": (setting, value) for setting, value in options.items()}
    for assignment in assignments:
        setting, separator, value = assignment.partition("=")
        if not separator or not setting:
            raise ValueError(f"set: expected NAME=VALUE, got {assignment!r}")
        if setting in options or (label := f"--set {setting}") in chosen:
            raise ValueError(f"set: {setting} is given twice")
        chosen[label] = (setting, value)
    inside = _inside(name, part, dict(chosen.values())) if part else None
    inner = _types(METHODS[inside]) if inside else {}

    given: dict[str, object] = {}
    given_inside: dict[str, object] = {}
    for label, (setting, value) in chosen.items():
        prefix, _, rest = setting.rpartition(".")
        if setting in own:
            given[setting] = _read(label, value, own[setting])
        elif rest in inner and prefix in ("", part):
            given_inside[rest] = _read(label, value, inner[rest])
        else:
            others = f"; its {part} {inside} has {', '.join(inner) or 'none'}" if inside else ""
            raise ValueError(f"{label}: the method {name} has no such setting, only {', '.join(own) or 'none'}{others}")
    if given_inside:
        given[part] = METHODS[inside](**given_inside)
    return METHODS[name](**given)


def _types(method: type[Method]) -> dict[str, tuple[type, ...]]:
    """Each setting of a method, with the types that its value may have."""
    hints = typing.get_type_hints(method)
    return {field.name: typing.get_args(hints[field.name]) or (hints[field.name],) for field in dataclasses.fields(method)}


def _inside(name: str, part: str, given: Mapping[str, object]) -> str | None:
    """The name of the method inside; None where it is unknown, which is the config's to refuse."""
    default = next(field.default for field in dataclasses.fields(METHODS[name]) if field.name == part)
    found = given.get(part, default)
    return found if found in METHODS else None


def _read(label: str, value: object, types: tuple[type, ...]) -> object:
    if not isinstance(value, str):
        return value
    if value == "none" and type(None) in types:
        return None
    for kind, expected, read in ((bool, "true or false", _truth), (int, "a whole number", int), (float, "a number", float)):
        if kind in types:
            try:
                return read(value)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{label}: expected {expected}, got {value!r}") from error
    return value


def _truth(value: str) -> bool:
    return {"true": True, "false": False}[value]
