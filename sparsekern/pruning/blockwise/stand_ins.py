"""Stand-ins: functions that run in place of a block's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..values import replaced
from .shelf import Kept, Shelf


class SharedTensors:
    """The tensors of arguments, on a shelf. Of those that are equal in successive batches, such as rotary tables and masks, one is kept.

    On a GPU those of the first batch stay there, as they may be those of all batches.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._of_gpu: Shelf | None = Shelf()  # during the first batch
        self._previous: list[Kept] = []
        self._current: dict[int, tuple[torch.Tensor, Kept]] = {}  # id -> (the tensor itself, kept alive; its place)

    def next_batch(self) -> None:
        """Begin a new batch, whose tensors are compared with those of the one before."""
        self._previous = [kept for _, kept in self._current.values()]
        self._current, self._of_gpu = {}, None

    def replace(self, value: Any) -> Any:
        """Return arguments of any type with the place of each tensor in place of it."""
        return replaced(value, torch.Tensor, self.place)

    def place(self, tensor: torch.Tensor) -> Kept:
        """Return the place of a tensor, or that of an equal one of the batch before."""
        if id(tensor) not in self._current:
            alike = (kept for kept in self._previous if kept.dtype == tensor.dtype and kept.shape == tensor.shape)
            same = next((kept for kept in alike if torch.equal(kept.get(), tensor)), None)
            shelf = self._shelf if self._of_gpu is None or tensor.is_cpu else self._of_gpu
            self._current[id(tensor)] = (tensor, same or Kept(shelf, tensor))
        return self._current[id(tensor)][1]


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Call these functions in place of the modules' own `forward` within."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, function in forwards.items():
            module.forward = function
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
