"""The package's warnings, and the name of what they are about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_subject: ContextVar[str] = ContextVar("subject", default="")


class SparsekernWarning(UserWarning):
    """The result is valid, but was reached otherwise than asked for."""


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn of `message`, after the subject that `warnings_about` set.

    Args:
        message: what happened.
        stacklevel: frames between this call's function and the line to blame, as for `warnings.warn`.
    """
    subject = _subject.get()
    warnings.warn(f"{subject}: {message}" if subject else message, SparsekernWarning, stacklevel=stacklevel + 1)


@contextmanager
def warnings_about(subject: str) -> Iterator[None]:
    """Put `subject`, such as a linear's name, in front of this thread's warnings within."""
    token = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(token)
