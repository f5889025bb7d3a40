"""Checks whether what follows a method fits into memory, in front of all work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .reader import copied_bytes

STATES = 4 * 4  # bytes a weight beside the dense model's states: gradient, two moments, and the weight from before


def check_room(model: nn.Module) -> None:
    """Raise `MemoryError` unless what distillation keeps of a dense model and the state of training fit beside the model."""
    device = next(model.parameters()).device
    free, needed = free_bytes(device), copied_bytes(model) + STATES * sum(parameter.numel() for parameter in model.parameters())
    if free is not None and needed > free:
        raise MemoryError(
            f"distill: expected {needed / 1e9:,.1f} GB for what is kept of the dense model and the state of training, got "
            f"{free / 1e9:,.1f} GB that are free on {device}"
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
