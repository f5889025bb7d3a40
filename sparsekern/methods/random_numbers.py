"""Random numbers for methods, from a generator of the run. Torch's own is shared by all threads."""

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
    """Let `generator` return `own` within, in this thread only."""
    token = _current.set(own)
    try:
        yield
    finally:
        _current.reset(token)
