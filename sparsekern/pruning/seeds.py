"""Random numbers that a resumed run reproduces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from ..methods.random_numbers import drawing_from
from .process import PutBack


def derived_seed(seed: int, name: str) -> int:
    """Return a seed that depends on `seed` and `name` alone."""
    return zlib.crc32(f"{seed} {name}".encode())


def seeded(seed: int, name: str) -> AbstractContextManager[None]:
    """Give methods a generator within whose numbers depend on `seed` and `name` alone, so that a resumed run reproduces them."""
    return drawing_from(torch.Generator().manual_seed(derived_seed(seed, name)))


@contextmanager
def torch_generators_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's own generators of the CPU and of `device` afterwards, once no other run uses them."""
    with ExitStack() as stack:
        for place in _places(device):
            stack.enter_context(_generators.kept(place))
        yield


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of `device`, for a model that draws from them."""
    for place in _places(device):
        _generator(place).manual_seed(seed)


@contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators within, for dropout, which uses no others, and restore them afterwards.

    All threads share these generators, so only one thread at a time may enter.
    """
    with _generators.lock:
        before = {place: _generator(place).get_state() for place in _places(device)}
        seed_torch(seed, device)
        try:
            yield
        finally:
            for place, state in before.items():
                _generator(place).set_state(state)


def _places(device: torch.device) -> list[str]:
    return ["cpu", *([str(device)] if device.type == "cuda" else [])]


def _generator(place: str) -> torch.Generator:
    device = torch.device(place)
    if device.type == "cpu":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


_generators: PutBack[str, torch.Tensor] = PutBack(
    lambda place: _generator(place).get_state(), lambda place, state: _generator(place).set_state(state)
)
