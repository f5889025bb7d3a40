"""`q4_scales`: the scales with which rounding weights to 4 bits costs the least."""

from __future__ import annotations

import torch

from .._checks import check_finite, check_tensor
from ..layouts.nm_q4 import COLUMNS, LEAST, nearest_multiple
from ._registry import define_op, sample

SCHEMA = "(Tensor weight, Tensor importance) -> Tensor"
STEPS = 24  # scales that are tried, from the one at which the largest weight is -8 steps down to half of it
ROWS_TOGETHER = 64  # whose scales the reference searches at once, so that they stay in the cache
LARGEST = -LEAST * torch.finfo(torch.float16).max


def q4_scales(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return the scales with the smallest weighted error of rounding each weight to the nearest of -8 to 7 times its scale.

    Of each row and 64 columns, 24 scales are tried. At the largest, the largest weight is -8 steps; at the smallest, it is cut off at half
    of that. Of equal errors the larger scale wins.

    Args:
        weight: `[out_features, in_features]` float32; zeros cost nothing.
        importance: `[in_features]` float32, the weight of each column's squared error. Negative ones are not looked for.

    Returns:
        `[out_features, ceil(in_features / 64)]` float16. A group of zeros has scale 0.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices; a value that is not finite, or a weight too large for a float16 scale.
    """
    check_tensor("weight", weight, ndim=2, dtypes=(torch.float32,))
    check_tensor("importance", importance, ndim=1, dtypes=(torch.float32,), shape=(weight.shape[1],), device=weight.device)
    return _op(weight, importance)


def reference(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    for name, value in (("weight", weight), ("importance", importance)):
        check_finite(name, value)
    if weight.numel() and float(weight.abs().max()) > LARGEST:
        raise ValueError(f"weight: expected magnitudes up to {LARGEST:,.0f}, which 4 bits and a float16 scale hold")
    rows, columns = weight.shape
    fill = -columns % COLUMNS
    groups = torch.nn.functional.pad(weight, (0, fill)).view(rows, (columns + fill) // COLUMNS, COLUMNS)
    costs = torch.nn.functional.pad(importance, (0, fill)).view(-1, COLUMNS)
    found = torch.empty(rows, groups.shape[1], dtype=torch.float16, device=weight.device)
    for own, out in zip(groups.split(ROWS_TOGETHER), found.split(ROWS_TOGETHER), strict=True):
        extreme = own.gather(-1, own.abs().argmax(-1, keepdim=True))
        best = least = torch.zeros_like(extreme)
        for step in range(STEPS):
            scale = (extreme / LEAST * (1 - step / (2 * (STEPS - 1)))).half().to(weight.dtype)
            cost = ((own - nearest_multiple(own, scale)).square_() * costs).sum(-1, keepdim=True)
            better = cost < least if step else torch.ones_like(cost, dtype=torch.bool)  # costs may be infinite
            best, least = torch.where(better, scale, best), torch.where(better, cost, least)
        out.copy_(best.squeeze(-1) + 0.0)  # no -0.0
    return found


def _fake(weight, importance):
    torch._check(weight.dim() == 2)
    return weight.new_empty((weight.shape[0], (weight.shape[1] + COLUMNS - 1) // COLUMNS), dtype=torch.float16)


def _samples(generator: torch.Generator):
    for rows, columns in ((5, 24), (70, 72), (16, 136)):
        weight = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) > 0.5)
        yield sample(weight, torch.rand(columns, generator=generator))


_op = define_op("q4_scales", SCHEMA, reference=reference, fake=_fake, samples=_samples)
