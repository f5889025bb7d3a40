"""Settings of method configs: each field declares its default, what it accepts and its help, once.

Validation, the command line (`--set`, `--help-method`), the `Args:` of docstrings and the tables of the docs are derived from them.
"""

from __future__ import annotations

import math
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

RULE = "setting"  # the key of a field's metadata under which its `Setting` is stored
WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """The rule of one field of a config.

    Attributes:
        default: the value where none is given.
        help: one line on the setting's effect, with its unit and the paper's value.
        expected: the accepted values, in the words of errors and tables.
        store: returns the value to store; raises `ValueError`, `TypeError` or `OverflowError` for one that is not accepted.
        read: parses the text of a command line; raises `ValueError` or `KeyError` for text that is not a value.
        optional: True if None is accepted too.
        is_method: True if the value is a method, by name or as a config, with settings of its own.
    """

    default: object
    help: str
    expected: str
    store: Callable[[Any], object]
    read: Callable[[str], object]
    optional: bool = False
    is_method: bool = False

    def checked(self, argument: str, value: object) -> object:
        """Return the value to store, or raise `ValueError` that names `argument`."""
        if value is None and self.optional:
            return None
        try:
            return self.store(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{argument}: expected {self.expected}, got {value!r}") from error

    def from_text(self, argument: str, text: str) -> object:
        """Return the value of `text`, where `none` is None, or raise `ValueError` that names `argument`."""
        if text == "none" and self.optional:
            return None
        try:
            return self.read(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{argument}: expected {self.expected}, got {text!r}") from error


class Settings:
    """Base of configs: frozen dataclasses whose fields are declared by the functions below, and checked on construction.

    A config with rules that involve several fields extends `__post_init__`.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        own = {name: value.metadata[RULE] for name, value in vars(cls).items() if RULE in getattr(value, "metadata", ())}
        if own and cls.__doc__:
            cls.__doc__ = _with_arguments(cls.__doc__, own)

    def __post_init__(self) -> None:
        for name, rule in settings_of(type(self)).items():
            object.__setattr__(self, name, rule.checked(f"{type(self).__name__}.{name}", getattr(self, name)))


def number(
    default: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    help: str,
) -> Any:
    """Declare a field that holds a finite number within these limits."""
    limits = {"above": above, "of at least": at_least, "below": below, "at most": at_most}
    expected = "a number " + " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)

    def store(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise TypeError
        value = value if type(value) in (int, float) else float(value)
        inside = (above is None or value > above, at_least is None or value >= at_least)
        if not all((*inside, below is None or value < below, at_most is None or value <= at_most)):
            raise ValueError
        return value

    return _declare(Setting(default, help, expected.strip(), store, float))


def whole(default: int | None, *, at_least: int, at_most: int | None = None, help: str) -> Any:
    """Declare a field that holds a whole number within these limits, or None if that is the default."""
    optional = default is None

    def store(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
            raise ValueError
        if at_most is not None and int(value) > at_most:
            raise ValueError
        return int(value)

    limits = f"of at least {at_least}" + ("" if at_most is None else f" and at most {at_most}")
    expected = f"a whole number {limits}" + (", or None" if optional else "")
    return _declare(Setting(default, help, expected, store, int, optional))


def choice(default: str | None, choices: tuple[str | None, ...], *, help: str) -> Any:
    """Declare a field that holds one of `choices`, which may include None."""

    def store(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    expected = f"one of {', '.join(map(repr, choices))}"
    return _declare(Setting(default, help, expected, store, str, None in choices))


def flag(default: bool, *, help: str) -> Any:
    """Declare a field that holds True or False; on a command line `true` or `false`."""

    def store(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return _declare(Setting(default, help, "True or False", store, {"true": True, "false": False}.__getitem__))


def mixed_precision() -> Any:
    """Declare the field of what trains a model that asks for bfloat16 products."""
    return flag(False, help="multiply in bfloat16 and keep weights and moments in float32, as 16-bit models always do")


def method(default: str, *, expected: str, help: str) -> Any:
    """Declare a field that holds a method, by name or as a config. Its class checks which methods it takes."""
    return _declare(Setting(default, help, expected, lambda value: value, str, is_method=True))


def check_choice(argument: str, value: object, choices: tuple) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def settings_of(config: type) -> dict[str, Setting]:
    """Return the rule of each declared field of a config class, by name, in the order of the constructor's arguments."""
    found: Mapping[str, Any] = getattr(config, "__dataclass_fields__", {})
    return {name: of.metadata[RULE] for name, of in found.items() if RULE in of.metadata}


def settings_table(config: type) -> str:
    """Return a Markdown table of a config class's settings: name, default, accepted values, meaning. It is empty for none."""
    rows = [f"| `{name}` | `{rule.default!r}` | {rule.expected} | {rule.help} |" for name, rule in settings_of(config).items()]
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows]) if rows else ""


def _declare(rule: Setting) -> Any:
    return field(default=rule.default, metadata={RULE: rule})


def _with_arguments(doc: str, rules: Mapping[str, Setting]) -> str:
    """Return a class's docstring with an `Args:` section in front of `Example:` and `Source:`, or at its end."""
    entries = []
    for name, rule in rules.items():
        text = f"{name}: {rule.help}. Accepts {rule.expected}; default {rule.default!r}."
        entries += textwrap.wrap(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)
    section = "    Args:\n" + "\n".join(entries) + "\n"
    place = min((at for title in ("Example:", "Source:") if (at := doc.find(f"\n    {title}")) >= 0), default=len(doc.rstrip()))
    return f"{doc[:place].rstrip()}\n\n{section}{doc[place:]}"
