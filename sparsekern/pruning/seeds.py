"""Random numbers that a resumed run draws again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, name: str) -> int:
    """A seed of its own for whatever `name` says."""
    return zlib.crc32(f"{seed} {name}".encode())


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers on the CPU that hang on a name and not on what was drawn before, which a resumed run does not draw again."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, name))
        yield
