"""Which linears of a block write to the residual stream, and which module reads the stream in front of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ...models import Linear

ROWS = 8  # of each activation that are compared


class _Reading(NamedTuple):
    """The first argument of a module, or the output of the block."""

    module: nn.Module | None
    rows: torch.Tensor


class _Output(NamedTuple):
    linear: Linear
    rows: torch.Tensor
    readings: int  # that came before


def residual_readers(block: nn.Module, linears: Sequence[Linear], run: Callable[[], object]) -> dict[str, nn.Module]:
    """Return for each linear that writes to the residual stream a module that takes the stream as it was before.

    A linear writes to it if its output plus the first argument of an earlier module is what a later module takes, or what the block
    returns. Where a model scales or normalises outputs before it adds them, none is found.

    Args:
        block: a block.
        linears: linears of the block.
        run: runs the block.
    """
    readings: list[_Reading] = []
    outputs: list[_Output] = []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if x is not None and x.dim() > 1 and x.is_floating_point():
            readings.append(_Reading(module, _rows(x)))

    def wrote(linear: Linear) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append(_Output(linear, _rows(output), len(readings)))

        return hook

    def returned(module: nn.Module, args: tuple, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            readings.append(_Reading(None, _rows(first)))

    with ExitStack() as stack:
        for module in block.modules():
            stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        for linear in linears:
            for module in linear.modules:
                stack.callback(module.register_forward_hook(wrote(linear)).remove)
        stack.callback(block.register_forward_hook(returned).remove)
        run()
    found: dict[str, nn.Module] = {}
    for output in outputs:
        before, after = readings[: output.readings], readings[output.readings :]
        reader = next((own.module for own in before if own.module and _adds_up(own.rows, output.rows, after)), None)
        if reader is not None:
            found[output.linear.name] = reader
    return found


@contextmanager
def stream_read(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a mapping that holds, once a block has run within, the residual stream in front of each linear, by name."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            found[name] = stream.clone()  # the block may add to it in place

        return read

    with ExitStack() as stack:
        for name, module in readers.items():
            stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield found


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1])[:ROWS].clone()


def _adds_up(stream: torch.Tensor, output: torch.Tensor, after: Sequence[_Reading]) -> bool:
    """Return whether the stream plus an output is what is read later, to the last bit."""
    if stream.shape != output.shape or stream.dtype != output.dtype:
        return False
    total = stream + output
    return not torch.equal(total, stream) and any(torch.equal(total, own.rows) for own in after)
