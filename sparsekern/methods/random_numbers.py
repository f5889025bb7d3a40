"""The random numbers that a method draws: from a generator of its run, not from torch's own, which all threads share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_current: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)


def generator() -> torch.Generator:
    """Return the CPU generator to draw from: within `prune`, one seeded for the linear that is solved; else torch's own.

    Example:
        >>> import torch
        >>> from sparsekern.methods import generator
        >>> noise = torch.rand(3, 4, generator=generator())
    """
    return _current.get() or torch.default_generator


@contextmanager
def drawing_from(own: torch.Generator) -> Iterator[None]:
    """Within, `generator` returns `own` in this thread."""
    token = _current.set(own)
    try:
        yield
    finally:
        _current.reset(token)
