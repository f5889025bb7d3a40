"""The package's warnings and their subject."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_subject: ContextVar[str] = ContextVar("subject", default="")


class SparsekernWarning(UserWarning):
    """A warning about a valid result that was not reached as requested.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", sparsekern.SparsekernWarning)
        ...     report = sparsekern.prune(model, "wanda", "2:4", ids, progress=False)
    """


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn about `message`, prefixed by the subject that `warnings_about` set.

    Args:
        message: the text of the warning.
        stacklevel: number of frames up from the caller to the line that is reported, as in `warnings.warn`.
    """
    subject = _subject.get()
    warnings.warn(f"{subject}: {message}" if subject else message, SparsekernWarning, stacklevel=stacklevel + 1)


@contextmanager
def warnings_about(subject: str) -> Iterator[None]:
    """Prefix the warnings of this thread with `subject`, such as the name of a linear, inside the block."""
    token = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(token)
