"""Checks whether what follows a method fits into memory, in front of what it needs the memory for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .reader import frozen_parameters

STATES = 4 + 2 * 4 + 1  # bytes a trained weight, beside its value from before: gradient, two moments and mask
FLOAT32 = 4  # bytes of the master of a 16-bit weight, and of that of a weight of 4 bits
CPU = torch.device("cpu")


def check_room(model: nn.Module, *, on_grid: bool = False, leaves: int = 1) -> None:
    """Raise `MemoryError` unless the state of training fits beside the model.

    Args:
        model: the model, still dense.
        on_grid: True if its linears will have values of 4 bits.
        leaves: the parts that this process sums gradients in.
    """
    _check_free(next(model.parameters()).device, training_bytes(model, on_grid, leaves), "the state of training")


def check_copy(model: nn.Module, copied: int, training: int) -> None:
    """Raise `MemoryError` unless a copy of the dense model fits beside the model, and the state of training beside both.

    Args:
        model: the model.
        copied: the bytes of the copy.
        training: those of the state of training.
    """
    _check_free(next(model.parameters()).device, copied + training, "a copy of the dense model and the state of training")


def check_states(device: torch.device, kept: int, training: int) -> None:
    """Raise `MemoryError` unless hidden states of the dense model fit into the memory of the host, with what else it is to hold.

    Args:
        device: that of the model, which holds the state of training.
        kept: the bytes of the hidden states that stay in memory.
        training: those of the state of training.
    """
    beside = training if device.type == CPU.type else 0
    _check_free(CPU, kept + beside, "the dense model's hidden states" + (" and the state of training" if beside else ""))


def _check_free(device: torch.device, needed: int, what: str) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"distill: expected {needed / 1e9:,.1f} GB for {what}, got {free / 1e9:,.1f} GB that are free on {device}"
        )


def training_bytes(model: nn.Module, on_grid: bool, leaves: int = 1) -> int:
    """Return the bytes that training adds to a model; see `check_room`."""
    frozen = frozen_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter not in frozen]
    partial = leaves.bit_length() - 1  # sums of gradients that wait for the current leaf, one of each height of the tree
    copies = FLOAT32 * partial + STATES
    masters = sum(of.numel() * FLOAT32 * ((of.itemsize < FLOAT32) + on_grid) for of in trained)
    return masters + sum(of.nbytes + of.numel() * copies for of in trained)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.exists():
        return None
    rows = (line.split() for line in told.read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)
