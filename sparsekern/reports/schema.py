"""The schema of `report.json`, which is written and read as strict JSON.

Every report has the keys `schema`, `kind`, `run`, `results` and `layers`. JSON has no infinity and no NaN, so these numbers are the
strings `"Infinity"`, `"-Infinity"` and `"NaN"`. `SCHEMA` is raised whenever a key is added, removed or changes its meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import NoReturn, TypeVar

SCHEMA = 1
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
T = TypeVar("T")


class _Default(Enum):
    """The default of a field that has none."""

    REQUIRED = 0


def dumps(report: Mapping[str, object]) -> bytes:
    """Return a report as UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, is written as a JSON escape."""
    text = json.dumps(_strict(report), indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _strict(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return value


def loads(path: Path) -> Fields:
    """Return the fields of a report, after a check of its `schema`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, no report, or has another schema.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {path} is not the JSON of a report ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"path: {path} is not a report: expected a JSON object, got {_name(found)}")
    if "schema" not in found:
        raise ValueError(f"path: {path} is not a report: it has no 'schema' (sparsekern 0.1 wrote reports without one)")
    schema = found["schema"]
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise ValueError(f"path: {path} is not a report: schema: expected a whole number of at least 1, got {schema!r}")
    if schema > SCHEMA:
        raise ValueError(
            f"path: {path} has schema {schema}; this version of sparsekern reads up to {SCHEMA}, a newer one is needed"
        )
    return Fields({key: value for key, value in found.items() if key != "schema"}, f"path: {path}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The fields of one JSON object, which are taken one by one, each with its type."""

    def __init__(self, found: Mapping[str, object], place: str) -> None:
        self._left, self._place = dict(found), place

    def take(self, name: str, read: Callable[[object], T], default: T | _Default = _Default.REQUIRED) -> T:
        """Return the field `name` as `read` converts it, or `default` where the field is missing.

        Raises:
            ValueError: the field is required and missing, or `read` refuses it.
        """
        if name not in self._left:
            if isinstance(default, _Default):
                raise ValueError(f"{self._place}: expected a field {name!r}, found none")
            return default
        try:
            return read(self._left.pop(name))
        except TypeError as error:
            raise ValueError(f"{self._place}: {name}: {error}") from error

    def inside(self, name: str) -> Fields:
        """Return the fields of the object `name`."""
        return Fields(self.take(name, mapping(anything)), f"{self._place}: {name}")

    def each(self, name: str) -> list[Fields]:
        """Return the fields of each object in the list `name`."""
        objects = self.take(name, listing(mapping(anything)))
        return [Fields(found, f"{self._place}: {name}[{index}]") for index, found in enumerate(objects)]

    def skip(self, *names: str) -> None:
        """Discard fields that follow from others."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Raise `ValueError` if a field is left, since this schema has no such field."""
        if self._left:
            raise ValueError(
                f"{self._place}: unknown field {', '.join(map(repr, self._left))}; schema {SCHEMA} has none of that name"
            )

    def refuse(self, name: str, expected: str, got: object) -> NoReturn:
        """Raise `ValueError` for the value of a field that was taken."""
        raise ValueError(f"{self._place}: {name}: expected {expected}, got {got!r}")


def anything(value: object) -> object:
    """Return a value unchanged."""
    return value


def number(value: object) -> float:
    """Return a number; infinity and NaN are read from their strings."""
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {_name(value)}")
    return value


def whole(value: object) -> int:
    """Return a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a whole number of at least 0, got {_name(value)}")
    return value


def text(value: object) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {_name(value)}")
    return value


def measurement(value: object) -> float | str:
    """Return a number or a text."""
    return value if isinstance(value, str) and value not in NOT_FINITE else number(value)


def optional(read: Callable[[object], T]) -> Callable[[object], T | None]:
    """Return a reader that takes null as None, and everything else by `read`."""
    return lambda value: None if value is None else read(value)


def listing(read: Callable[[object], T]) -> Callable[[object], list[T]]:
    """Return a reader of a list, whose entries `read` takes."""

    def take(value: object) -> list[T]:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {_name(value)}")
        return [read(entry) for entry in value]

    return take


def pair(read: Callable[[object], T]) -> Callable[[object], tuple[T, T]]:
    """Return a reader of a list of two entries, which `read` takes."""

    def take(value: object) -> tuple[T, T]:
        if not isinstance(value, list) or len(value) != 2:
            raise TypeError(f"expected a list of two, got {_name(value)}")
        return read(value[0]), read(value[1])

    return take


def mapping(read: Callable[[object], T]) -> Callable[[object], dict[str, T]]:
    """Return a reader of an object, whose values `read` takes."""

    def take(value: object) -> dict[str, T]:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got {_name(value)}")
        return {key: read(entry) for key, entry in value.items()}

    return take


def _name(value: object) -> str:
    """Return a short JSON name of a value."""
    kinds = {type(None): "null", bool: "a truth value", dict: "an object", list: "a list"}
    if type(value) in (int, float, str):
        shown = json.dumps(value)
        return shown if len(shown) <= 40 else f"{shown[:40]}…"
    return kinds[type(value)]
