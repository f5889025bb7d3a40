"""Stand-ins: functions that run in place of a block's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..values import replaced


class SharedTensors:
    """A cache that keeps one copy of arguments that are equal in successive batches, such as rotary tables and masks."""

    def __init__(self) -> None:
        self._previous: list[torch.Tensor] = []
        self._current: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (the tensor itself, kept alive; its stand-in)

    def next_batch(self) -> None:
        """Begin a new batch, whose tensors are compared with those of the one before."""
        self._previous = [kept for _, kept in self._current.values()]
        self._current = {}

    def replace(self, value: Any) -> Any:
        """Return arguments of any type with each tensor replaced by an equal one of the batch before."""
        return replaced(value, torch.Tensor, self._one)

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._current:
            same = (t for t in self._previous if t.dtype == tensor.dtype and torch.equal(t, tensor))
            self._current[id(tensor)] = (tensor, next(same, tensor))
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
