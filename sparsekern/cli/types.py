"""Readers of option values, for `type` of argparse: each returns a value or raises with what was expected."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from ..models.limits import memory_limit
from ..models.load import device_of
from ..pattern import Pattern, parse_pattern
from ..pruning import check_seed
from ..runtime import check_format
from ..runtime.packing import check_packed_format

T = TypeVar("T")


def _reads(argument: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """Pass on the message of a reader's `ValueError`, which argparse would drop.

    The option names the argument already, so the `argument` that begins the message is removed.
    """

    def decorate(read: Callable[[str], T]) -> Callable[[str], T]:
        @functools.wraps(read)
        def reading(text: str) -> T:
            try:
                return read(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error).removeprefix(f"{argument}: ")) from error

        return reading

    return decorate


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """Return a reader that accepts these words only."""
    words = tuple(choices)

    def read(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(words)}, got {text!r}")
        return text

    return read


@_reads("")
def count(text: str) -> int:
    """Read a whole number of at least 1."""
    number = _whole(text)
    if number < 1:
        raise ValueError(f"expected at least 1, got {number}")
    return number


@_reads("seed")
def seed(text: str) -> int:
    """Read a seed that every generator takes."""
    number = _whole(text)
    check_seed(number)
    return number


@_reads("pattern")
def pattern(text: str) -> Pattern:
    """Read `N:M` or a share of zeros."""
    return parse_pattern(text)


@_reads("pattern")
def pattern_for(text: str) -> tuple[str, Pattern | None]:
    """Read `GLOB=PATTERN`; the pattern `dense` is None."""
    glob, separator, value = text.rpartition("=")
    if not separator or not glob:
        raise ValueError(f"expected GLOB=PATTERN, got {text!r}")
    return glob, None if value == "dense" else parse_pattern(value)


def names(text: str) -> tuple[str, ...]:
    """Read names that commas separate."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return found


def setting(text: str) -> tuple[str, str]:
    """Read `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


@_reads("device")
def device(text: str) -> torch.device:
    """Read an available device; `auto` is cuda if there is one."""
    return device_of(text)


@_reads("format")
def format_to_save(text: str) -> str:
    """Read a format to save in."""
    check_format(text)
    return text


@_reads("format")
def format_to_pack(text: str) -> str:
    """Read a packed format; `packed` is the smallest for each linear."""
    check_packed_format(text)
    return text


@_reads("max_memory")
def memory(text: str) -> int | None:
    """Read a limit of memory, as bytes or such as `8GB`."""
    return memory_limit(text)


@_reads("")
def share(text: str) -> float:
    """Read a number; the method that it belongs to checks its limits."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"expected a share such as 0.25, got {text!r}") from error


@_reads("")
def path(text: str) -> Path:
    """Read a path; `~` is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"expected a path, got {text!r}, whose home folder is not known") from error


@_reads("")
def svg_file(text: str) -> Path:
    """Read the name of an .svg file in an existing folder."""
    file = path(text)
    if file.suffix != ".svg":
        raise ValueError(f"expected a file name that ends in .svg, got {text!r}")
    if not file.parent.is_dir():
        raise ValueError(f"expected an existing folder for {file.name!r}, got {str(file.parent)!r}")
    return file


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"expected a whole number, got {text!r}") from error
