"""The rules of settings: what a config accepts, what it stores, and what help, docstrings and tables say of it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import numpy as np
import pytest
import torch

from sparsekern.methods import METHODS, Wanda, settings_of, settings_table
from sparsekern.methods._fields import Settings, choice, flag, number, whole


@dataclass(frozen=True)
class Config(Settings):
    """Hold one setting of each kind.

    Source: nowhere.
    """

    share: float = number(0.5, at_least=0, below=1, help="share of the whole")
    rate: float = number(1e-3, above=0, help="learning rate")
    any: float = number(0.0, help="any number")
    steps: int = whole(4, at_least=1, help="steps")
    limit: int | None = whole(None, at_least=0, help="largest number of steps")
    scope: str = choice("row", ("row", "matrix"), help="scope")
    mask: str | None = choice(None, (None, "wanda"), help="mask")
    tune: bool = flag(True, help="tune")
    plain: object = None  # of a user's own config, checked by nobody


class Word(str, Enum):
    ROW = "row"


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("share", 0, 0),
        ("share", np.float32(0.25), 0.25),
        ("share", np.float64(0.25), 0.25),
        ("share", Fraction(1, 4), 0.25),
        ("any", -(10**300), -(10**300)),
        ("steps", np.int64(7), 7),
        ("limit", None, None),
        ("limit", np.uint8(0), 0),
        ("mask", None, None),
        ("scope", Word.ROW, "row"),
    ],
)
def test_numbers_and_words_of_other_types_are_stored_as_plain_ones(name, given, stored):
    found = getattr(Config(**{name: given}), name)
    assert found == stored and type(found) in (int, float, type(None), Word)
    assert json.loads(json.dumps(found)) == stored


@pytest.mark.parametrize(
    "bad", [True, "0.1", None, math.nan, math.inf, -math.inf, 10**400, 1j, [0.1], torch.tensor(0.1), np.array([0.1])]
)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("share", "a number of at least 0 and below 1"), ("rate", "a number above 0"), ("any", "a number")],
)
def test_what_is_no_finite_number_is_refused(name, expected, bad):
    with pytest.raises(ValueError) as refused:
        Config(**{name: bad})
    assert str(refused.value) == f"Config.{name}: expected {expected}, got {bad!r}"


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("share", 1, "a number of at least 0 and below 1"),
        ("share", -1e-30, "a number of at least 0 and below 1"),
        ("rate", 0.0, "a number above 0"),
        *(("steps", bad, "a whole number of at least 1") for bad in (0, 1.0, "1", None, True, torch.tensor(3), np.float32(2))),
        ("limit", -1, "a whole number of at least 0, or None"),
        *(("scope", bad, "one of 'row', 'matrix'") for bad in (None, "Row", 3, ["row"], np.array(["row", "row"]))),
        ("mask", "none", "one of None, 'wanda'"),
        *(("tune", bad, "True or False") for bad in (1, 0, "true", None, np.array([True, False]))),
    ],
)
def test_what_a_setting_does_not_accept_is_refused_by_name(name, bad, expected):
    with pytest.raises(ValueError) as refused:
        Config(**{name: bad})
    assert str(refused.value) == f"Config.{name}: expected {expected}, got {bad!r}"


def test_a_config_is_checked_when_it_is_replaced_and_names_its_own_class():
    @dataclass(frozen=True)
    class Mine(Config):
        """Add a field."""

        extra: int = whole(1, at_least=1, help="extra")

    assert list(settings_of(Mine)) == [*settings_of(Config), "extra"]
    with pytest.raises(ValueError, match="Mine.steps: expected a whole number of at least 1, got 0"):
        dataclasses.replace(Mine(), steps=0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("rate", "1e-2", 0.01), ("steps", "3", 3), ("limit", "none", None), ("mask", "none", None), ("tune", "false", False)],
)
def test_settings_are_read_from_text(name, text, value):
    assert settings_of(Config)[name].from_text("--set", text) == value


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("rate", "big", "a number above 0"), ("steps", "2.5", "a whole number of at least 1"), ("tune", "yes", "True or False")],
)
def test_text_that_says_no_value_is_refused(name, text, expected):
    with pytest.raises(ValueError, match=f"--set {name}: expected {expected}, got '{text}'"):
        settings_of(Config)[name].from_text(f"--set {name}", text)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_field_of_every_method_has_its_rule_its_help_and_its_place_in_the_docstring(method):
    rules = settings_of(method)
    assert list(rules) == [field.name for field in dataclasses.fields(method)]
    for name, rule in rules.items():
        assert rule.default == rule.checked(name, rule.default)
        assert rule.help and "\n" not in rule.help and len(rule.help) <= 130 and not rule.help.endswith(".")
        assert f"{name}: {rule.help}." in " ".join(method.__doc__.split())
    assert method.__doc__.count("Args:") == bool(rules)
    assert method.__doc__.find("Args:") < method.__doc__.find("Source:") or "Source:" not in method.__doc__


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Do.\n\n    Source: here.\n    ", "Do.\n\n    Args:\n        k: rows. Accepts {}; default 1.\n\n    Source: here.\n    "),
        (
            "Do.\n\n    Example:\n        >>> 1\n\n    Source: here.\n    ",
            "Do.\n\n    Args:\n        k: rows. Accepts {}; default 1.\n\n    Example:\n        >>> 1\n\n    Source: here.\n    ",
        ),
        ("Do.\n\n    More.\n    ", "Do.\n\n    More.\n\n    Args:\n        k: rows. Accepts {}; default 1.\n\n    "),
        ("Do.", "Do.\n\n    Args:\n        k: rows. Accepts {}; default 1.\n"),
    ],
)
def test_arguments_stand_in_the_docstring_before_example_and_source(doc, expected):
    made = type("Made", (Settings,), {"__doc__": doc, "__annotations__": {"k": int}, "k": whole(1, at_least=1, help="rows")})
    assert made.__doc__ == expected.format("a whole number of at least 1")


def test_the_table_of_a_method_s_settings():
    lines = settings_table(Config).splitlines()
    assert lines[:3] == [
        "| setting | default | values | meaning |",
        "|---|---|---|---|",
        "| `share` | `0.5` | a number of at least 0 and below 1 | share of the whole |",
    ]
    assert len(lines) == 2 + len(settings_of(Config))
    assert settings_table(Wanda) == ""
    assert all(line.count("|") == 5 for method in METHODS.values() for line in settings_table(method).splitlines())
