"""Grids of 4-bit values that weights stay on while they are trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .._warnings import SparsekernWarning
from ..layouts.q4_grid import grid_scales, on_refitted_grid
from ..models import Linear
from ..models.linears import is_conv1d


class Grid:
    """The grid of what a parameter stores: a scale for each row and 64 columns of each of its linears.

    Training is straight-through: a master moves, the parameter is the master rounded to the grid, and the gradient at the parameter is
    taken for that at the master. The scales follow the masters.
    """

    def __init__(self, linears: Sequence[Linear], scales: Sequence[torch.Tensor]) -> None:
        """Begin with the scales of each linear, float16 `[out_features, ceil(in_features / 64)]`."""
        self._linears, self._scales = tuple(linears), list(scales)

    @torch.no_grad()
    def round_(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        """Write the masters to a parameter, rounded to the grid with scales that are fitted to them; see `on_refitted_grid`."""
        parameter.copy_(master)
        for number, linear in enumerate(self._linears):
            rounded, self._scales[number] = on_refitted_grid(_matrix(linear, master), self._scales[number])
            _matrix(linear, parameter).copy_(rounded)

    @property
    def scales(self) -> torch.Tensor:
        """The scales of all linears, one below the other."""
        return torch.cat(self._scales)

    @scales.setter
    def scales(self, scales: torch.Tensor) -> None:
        self._scales = list(scales.split([len(own) for own in self._scales]))


def grids_of(linears: Iterable[Linear]) -> dict[nn.Parameter, Grid]:
    """Return the grid of each parameter that stores linears with values of 4 bits. A warning names linears on no grid."""
    found: dict[nn.Parameter, list[tuple[Linear, torch.Tensor]]] = {}
    off: list[str] = []
    for linear in linears:
        scales = grid_scales(linear.weight)
        if scales is not None:
            found.setdefault(linear.parameter, []).append((linear, scales))
        else:
            off.append(linear.name)
    if off:
        others = f" and {len(off) - 1} others" if len(off) > 1 else ""
        warnings.warn(
            f"{off[0]}{others}: the weights are on no grid of 4-bit values, so they are trained to any values of their dtype",
            SparsekernWarning,
            stacklevel=2,
        )
    return {parameter: Grid(*zip(*parts, strict=True)) for parameter, parts in found.items()}


def _matrix(linear: Linear, stored: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor in the layout of a parameter that belongs to a linear, `[out_features, in_features]`."""
    part = linear.part_of(stored)
    return part.T if is_conv1d(linear.modules[0]) else part
