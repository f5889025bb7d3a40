"""Capabilities of devices, with the reason if something cannot run."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

MOST_COLUMNS = 2**26  # columns of packed rows, so that a position in 16 rows fits 32 bits
MOST_EXPERTS = 1023  # of one call, which a program compares with several tokens at a time
MOST_PAIRS = 2**24  # tokens times choices of one call, so that programs and places fit 32 bits


class Support(NamedTuple):
    """The answer to whether something can run.

    Attributes:
        ok: it can run.
        reason: why not; empty if it can.
    """

    ok: bool
    reason: str = ""


YES = Support(True)


def has_capability(device: torch.device, least: tuple[int, int]) -> Support:
    """Return whether a device has compute capability `least`; a CPU, where only tests run kernels, has all capabilities."""
    if device.type != "cuda":
        return YES
    found = _capability(device)
    if found >= least:
        return YES
    return Support(False, f"it needs compute capability {least[0]}.{least[1]}, and this device has {found[0]}.{found[1]}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, once looked up: torch asks the driver in each call, too slow for the product of one token."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def has_triton() -> Support:
    """Return whether Triton is installed."""
    return YES if importlib.util.find_spec("triton") is not None else Support(False, "triton is not installed")


def can_place_columns(name: str, columns: int) -> Support:
    """Return whether a kernel can index packed rows of `columns` columns; the reason calls them by the argument `name`."""
    if columns <= MOST_COLUMNS:
        return YES
    return Support(False, f"{name} has {columns} input features, more than {MOST_COLUMNS}")


def can_group_pairs(experts: torch.Tensor, count: int) -> Support:
    """Return whether a kernel can group tokens by their choice among `count` experts."""
    if count > MOST_EXPERTS:
        return Support(False, f"there are {count} experts, more than {MOST_EXPERTS}")
    if experts.numel() > MOST_PAIRS:
        return Support(False, f"experts names {experts.numel()}, more than {MOST_PAIRS}")
    return YES
