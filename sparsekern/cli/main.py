"""Entry point of `sparsekern prune | eval | pack | bench | export | info`. Exit codes: 0 success, 1 failure, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TextIO

from tqdm import tqdm

from .._info import info
from .._warnings import SparsekernWarning
from ..ranks import World
from . import bench, continual, evaluate, export, pack, prune
from .common import DEFAULT_TEXT
from .parser import make_parser
from .ranks import HeardWarnings, joined, rank, ranks

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C stopped
GRACE = 1  # seconds for the first rank to print an error, since torchrun ends all ranks once one of them has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the name of the program. None is those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(argv)
    arguments.command_line = ["sparsekern", *argv]
    with warnings.catch_warnings(), _log_shown():
        for about_code in () if arguments.debug else (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", about_code)  # they address developers of other packages
        warnings.simplefilter("always", SparsekernWarning)
        heard = HeardWarnings()
        warnings.showwarning = partial(_show_warning, heard)
        try:
            code = 2  # an error before any work is one of usage
            with joined(arguments, lambda: f"sparsekern {arguments.name}: rank {rank()} stopped{_hint(arguments)}"):
                world = World.current()
                with world.together():
                    work = _prepared(arguments)
                    code = 1
                    work()
                    for text in heard.share(world):
                        tqdm.write(text, file=sys.stderr)
        except KeyboardInterrupt:
            print(f"sparsekern {arguments.name}: interrupted{_hint(arguments)}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:  # the boundary of the program prints one line instead of a traceback
            return _failed(arguments, error, code)
    return 0


def _hint(arguments: argparse.Namespace) -> str:
    """Return what to do after the command was stopped, as the end of a line."""
    if arguments.name != "prune":
        return ""
    arguments.calibration = arguments.calibration or [DEFAULT_TEXT]
    return f"; {_kind_of_prune(arguments).interrupted_hint(arguments)}"


def _prepared(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the command line before any work, and return the work."""
    if arguments.name == "info":
        return partial(_print_info, as_json=arguments.json)
    if arguments.name == "prune":
        arguments.calibration = arguments.calibration or [DEFAULT_TEXT]
        return _kind_of_prune(arguments).prepare(arguments)
    return {"eval": evaluate, "pack": pack, "bench": bench, "export": export}[arguments.name].prepare(arguments)


def _kind_of_prune(arguments: argparse.Namespace) -> ModuleType:
    """Return the module that prunes with one text, or the one for several texts in turn."""
    return continual if len(arguments.calibration) > 1 or arguments.state is not None else prune


def _print_info(as_json: bool) -> None:
    found = info()
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def _failed(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    """Print the error in one line, or as a traceback with `--debug`, and return the exit code."""
    if rank() and not isinstance(error, ConnectionError):  # the first rank prints the same
        time.sleep(GRACE)
    elif arguments.debug:
        traceback.print_exception(error)
    else:
        print(f"sparsekern {arguments.name}: error: {_one_line(error)}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__} (--debug shows where)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{lines[0]} ({error.filename})"
    return lines[0]


class _Lines(logging.Handler):
    """A handler that prints records beside a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _log_shown() -> Iterator[None]:
    """Print the log records of the package, warnings and above."""
    logger, handler = logging.getLogger("sparsekern"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _show_warning(
    heard: HeardWarnings,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    place = "" if issubclass(category, SparsekernWarning) else f"{filename}:{lineno}: "
    text = f"warning: {place}{message}"
    if ranks() > 1:
        heard.texts.append(text)
    if not rank():
        tqdm.write(text, file=sys.stderr)  # beside a progress bar, not into it
