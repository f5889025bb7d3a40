"""What can run on a device, and the reason where something cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_COLUMNS = 2**26  # of packed rows, so that 32 bits hold a place in 16 of them


class Support(NamedTuple):
    """Whether something can run, and the reason if not."""

    ok: bool
    reason: str = ""


YES = Support(True)


def has_capability(device: torch.device, least: tuple[int, int]) -> Support:
    """Return whether a CUDA device has compute capability `least`; a CPU, where only tests run kernels, has every one."""
    if device.type != "cuda":
        return YES
    found = torch.cuda.get_device_capability(device)
    if found >= least:
        return YES
    return Support(False, f"it needs compute capability {least[0]}.{least[1]}, and this device has {found[0]}.{found[1]}")


def can_place_columns(name: str, columns: int) -> Support:
    """Return whether a kernel can number the places of packed rows of `columns` columns, which are those of the argument `name`."""
    if columns <= MOST_COLUMNS:
        return YES
    return Support(False, f"{name} has {columns} input features, more than {MOST_COLUMNS}")
