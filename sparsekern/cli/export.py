"""`sparsekern export`: a model in the file of another program."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from ..export.gguf_file import check_gguf, checked_file, export_gguf, summary_of
from .common import load_model, load_tokenizer_of, say


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check a command line as far as possible without a model, and return the work.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the name of the file does not end in `.gguf`.
        FileNotFoundError: its folder is missing.
        FileExistsError: the file exists.
    """
    check_gguf()
    checked_file(arguments.gguf, overwrite=arguments.overwrite)
    return partial(_export, arguments)


def _export(arguments: argparse.Namespace) -> None:
    tokenizer = None if arguments.no_tokenizer else load_tokenizer_of(arguments)
    model = load_model(arguments)
    say(f"writing {arguments.gguf}")
    file = export_gguf(model, arguments.gguf, tokenizer=tokenizer, type=arguments.type, overwrite=arguments.overwrite)
    print(f"wrote {file}: {summary_of(file)}")
