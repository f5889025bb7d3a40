"""The command line: `sparsekern prune | eval | bench | info`. Exit code 0: done; 1: it failed; 2: it was called wrongly."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from .._info import info
from .._warnings import SparsekernWarning
from . import bench, continual, evaluate, prune
from .common import DEFAULT_TEXT
from .parser import make_parser

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(argv)
    arguments.command_line = ["sparsekern", *argv]
    with warnings.catch_warnings(), _log_shown():
        for about_code in () if arguments.debug else (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", about_code)  # of other packages' developers, to theirs
        warnings.simplefilter("always", SparsekernWarning)
        warnings.showwarning = _show_warning
        try:
            code = 2  # what is wrong before any work is the command line
            work = _prepared(arguments)
            code = 1
            work()
        except KeyboardInterrupt:
            hint = f"; {_kind_of_prune(arguments).interrupted_hint(arguments)}" if arguments.name == "prune" else ""
            print(f"sparsekern {arguments.name}: interrupted{hint}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:  # the boundary of the program: one line for a person instead of a traceback
            return _failed(arguments, error, code)
    return 0


def _prepared(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the command line before any work, and return the work."""
    if arguments.name == "info":
        return partial(_print_info, as_json=arguments.json)
    if arguments.name == "prune":
        arguments.calibration = arguments.calibration or [DEFAULT_TEXT]
        return _kind_of_prune(arguments).prepare(arguments)
    return {"eval": evaluate, "bench": bench}[arguments.name].prepare(arguments)


def _kind_of_prune(arguments: argparse.Namespace):
    """Return the module for one text, or the one for several in turn."""
    return continual if len(arguments.calibration) > 1 or arguments.state is not None else prune


def _print_info(as_json: bool) -> None:
    found = info()
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def _failed(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    """Say what went wrong, in one line or with `--debug` as a traceback, and return the exit code."""
    if arguments.debug:
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
    """Print what the package logs from warnings upwards."""
    logger, handler = logging.getLogger("sparsekern"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    place = "" if issubclass(category, SparsekernWarning) else f"{filename}:{lineno}: "
    tqdm.write(f"warning: {place}{message}", file=sys.stderr)  # beside a progress bar, not into it
