"""Checks of what may follow a method, in front of all work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...methods import BlockTuning, Distill, LinearMethod, Method, Training
from ...models.streaming import stream_of
from .reader import copied_bytes

STATES = 4 * 4  # bytes a weight beside the dense copy: gradient, two moments, and the weight from before


def check_training(tune: BlockTuning | None, distill: Distill | None, method: Method, model: nn.Module, leaves: int) -> None:
    """Raise unless the result of a run can be trained in these ways.

    Args:
        tune: see `sparsekern.prune`.
        distill: see `sparsekern.prune`.
        method: the method that prunes the linears.
        model: the model.
        leaves: the number of parts that statistics are summed in.

    Raises:
        TypeError: `tune` is no `BlockTuning`, or `distill` no `Distill`.
        ValueError: the method leaves no masks block by block, the model is streamed, or several processes or leaves share the work.
        MemoryError: the dense copy of the model that `distill` needs does not fit.
    """
    kinds: tuple[tuple[str, object, type[Training]], ...] = (("tune", tune, BlockTuning), ("distill", distill, Distill))
    for argument, given, kind in kinds:
        if given is None:
            continue
        if not isinstance(given, kind):
            raise TypeError(f"{argument}: expected a config such as {kind.__name__}(), or None, got {given!r}")
        if not isinstance(method, LinearMethod):
            raise ValueError(f"{argument}: expected None for {type(method).__name__}, which leaves no masks block by block")
        if stream_of(model) is not None:
            raise ValueError(f"{argument}: expected None for a streamed model, whose dense blocks are not in memory")
        if leaves > 1:
            raise ValueError(f"{argument}: expected None for sums in {leaves} parts (several processes, or leaves)")
    if distill is not None:
        _check_room(model)


def _check_room(model: nn.Module) -> None:
    """Raise `MemoryError` unless the dense copy and the state of training fit beside the model."""
    device = next(model.parameters()).device
    free, needed = free_bytes(device), copied_bytes(model) + STATES * sum(parameter.numel() for parameter in model.parameters())
    if free is not None and needed > free:
        raise MemoryError(
            f"distill: expected {needed / 1e9:,.1f} GB for a dense copy of the model and the state of training, got {free / 1e9:,.1f} GB "
            f"that are free on {device}"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.exists():
        return None
    rows = (line.split() for line in told.read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)
