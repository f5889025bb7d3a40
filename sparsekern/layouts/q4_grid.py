"""The grid that the values of a weight lie on: found again from a dense weight of 4-bit values, and fitted to a weight that moves."""

from __future__ import annotations

import torch

from .nm_q4 import COLUMNS, LEAST, MOST, nearest_code

ROWS_TOGETHER = 64  # so that they stay in the cache
FIRST_ROWS = 4  # which tell most other weights
FEWEST_LEVELS = 3  # a weight that uses no code beyond is on too many grids to tell


def grid_scales(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the scales with which each weight is -8 to 7 times the scale of its row and 64 columns, or None if there are none.

    In float32 the products are exact. In a half dtype each weight may differ from the product by its rounding to the dtype.

    Args:
        weight: `[rows, columns]` of floating point, on a grid before it was rounded to its dtype.

    Returns:
        `[rows, ceil(columns / 64)]` float16. A group of zeros has scale 0.
    """
    found = []
    for rows in (weight[:FIRST_ROWS], *weight[FIRST_ROWS:].split(ROWS_TOGETHER)):
        scales = _of_rows(rows)
        if scales is None:
            return None
        found.append(scales)
    return torch.cat(found)


def is_on_grid(weight: torch.Tensor) -> bool:
    """Return whether `weight` has values of 4 bits, and uses enough of them to tell it from a weight of few distinct values."""
    return telling_scales(weight) is not None


def telling_scales(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the scales of a weight that `is_on_grid`, None for another; see `grid_scales`."""
    scales = grid_scales(weight)
    if scales is None:
        return None
    codes = nearest_code(weight.float(), scales.float().repeat_interleave(COLUMNS, 1)[:, : weight.shape[1]])
    return scales if bool((codes.abs() > FEWEST_LEVELS).any()) else None


def on_refitted_grid(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights to the nearest multiples of their scales, then fit each scale to its weights by least squares.

    Args:
        weight: `[rows, columns]` float32.
        scales: `[rows, ceil(columns / 64)]` float16.

    Returns:
        The weight on the grid of the new scales, never `-0.0`, and these scales. A group without a code beside 0 keeps its scale.
    """
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -columns % COLUMNS)).view(rows, -1, COLUMNS)
    codes = nearest_code(groups, scales.float().unsqueeze(-1))
    fitted = ((groups * codes).sum(-1) / codes.square().sum(-1).clamp(min=1)).half()
    fitted = torch.where((fitted != 0) & fitted.isfinite(), fitted, scales)
    return (fitted.float().unsqueeze(-1) * codes + 0.0).flatten(1)[:, :columns], fitted


def _of_rows(weight: torch.Tensor) -> torch.Tensor | None:
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -columns % COLUMNS)).view(rows, -(-columns // COLUMNS), COLUMNS)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    found, left = torch.zeros_like(extreme), extreme != 0
    tolerance = _tolerance(weight.dtype)
    for code in range(1, -LEAST + 1):  # that of the largest weight
        scale = extreme.abs() / code if code <= MOST else extreme / LEAST
        codes = nearest_code(groups, scale)
        if tolerance:  # the scale that all weights agree on best
            scale = (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
        scale = scale.half().float()
        fits = ((groups - scale * codes).abs() <= tolerance * groups.abs()).all(-1, keepdim=True) & left
        found, left = torch.where(fits, scale, found), left & ~fits
    return None if left.any() else found.squeeze(-1).half()


def _tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative difference of a weight and a product: the rounding of both, and of the scale to float16."""
    return 0.0 if dtype == torch.float32 else 1.25 * torch.finfo(dtype).eps + torch.finfo(torch.float16).eps / 2
