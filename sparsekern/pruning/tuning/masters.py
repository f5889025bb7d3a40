"""Parameters in float32 while they are trained, and the ones that have gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def float32_masters(
    parameters: Iterable[nn.Parameter], *, mixed_precision: bool = False
) -> Iterator[tuple[torch.autocast, torch.autocast]]:
    """Make 16-bit parameters float32 within. Afterwards their own memory holds them, rounded.

    Yield the autocasts to train in and to judge in. Both let 16-bit parameters compute in bfloat16. With `mixed_precision` the first
    lets float32 ones do so.
    """
    parameters = list(parameters)
    halves = {parameter: parameter.data for parameter in parameters if parameter.dtype in (torch.bfloat16, torch.float16)}
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        autocast = partial(torch.autocast, parameters[0].device.type, torch.bfloat16)
        yield autocast(enabled=mixed_precision or bool(halves)), autocast(enabled=bool(halves))
    finally:
        for parameter, half in halves.items():
            parameter.data = half.copy_(parameter.data)


@contextmanager
def only_these_require_gradients(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let `parameters` alone require gradients within `module`, and restore all flags afterwards. No gradient is left behind."""
    wanted = set(parameters)
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    held = {parameter: parameter.grad for parameter in before}
    try:
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        yield
    finally:
        for parameter, required in before.items():
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = held[parameter]
