"""Random numbers that a resumed run draws again."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ..methods.random_numbers import drawing_from

_torch_generators = threading.RLock()


def derived_seed(seed: int, name: str) -> int:
    """Return a seed of its own for `name`."""
    return zlib.crc32(f"{seed} {name}".encode())


def seeded(seed: int, name: str) -> AbstractContextManager[None]:
    """Give methods a generator whose numbers depend on `seed` and `name` alone, so that a resumed run draws them again."""
    return drawing_from(torch.Generator().manual_seed(derived_seed(seed, name)))


@contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators within, for what takes no other (dropout), and put them back afterwards.

    All threads share these generators, so only one at a time is let in.
    """
    with _torch_generators, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
