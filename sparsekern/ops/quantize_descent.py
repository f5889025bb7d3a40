"""`quantize_descent_`: lower the error of weights of 4 bits, one weight at a time."""

from __future__ import annotations

import torch

from .._checks import check_finite, check_square, check_tensor, check_whole
from ..layouts.nm_q4 import COLUMNS, nearest_multiple
from ._registry import define_op, sample
from .obs_quantize import check_scales, problem

SCHEMA = "(Tensor(a!) weight, Tensor(b!) residual, Tensor hessian, Tensor mask, Tensor scales, int passes=1) -> ()"


def quantize_descent_(
    weight: torch.Tensor,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor,
    scales: torch.Tensor,
    passes: int = 1,
) -> torch.Tensor:
    """Move each kept weight in turn to the multiple of its scale with the smallest error, all others fixed.

    With a target `T` the error is `(weight - T) H (weight - T)^T`. No move raises it, apart from rounding in float32. Columns are
    visited in ascending order, and a column where `H` has 0 on its diagonal is left as it is.

    Args:
        weight: `[out_features, in_features]` float32, changed in place: -8 to 7 times the scales where kept.
        residual: `[out_features, in_features]` float32, `(weight - T) @ hessian`, kept up to date in place.
        hessian: `[in_features, in_features]` float32, symmetric: both triangles are read.
        mask: `[out_features, in_features]` bool, True where kept.
        scales: `[out_features, ceil(in_features / 64)]` float16, one for each row and 64 columns.
        passes: number of visits of each weight.

    Returns:
        `weight`.

    Raises:
        TypeError: a wrong dtype; `passes` is not a whole number.
        ValueError: wrong shapes or devices; a value that is not finite.

    Source: Behdin et al., QuantEase, 2023, algorithm 2, without the weights outside a mask.
    """
    check_tensor("weight", weight, ndim=2, dtypes=(torch.float32,))
    check_tensor("residual", residual, ndim=2, dtypes=(torch.float32,), shape=tuple(weight.shape), device=weight.device)
    check_square("hessian", hessian)
    features = weight.shape[1]
    check_tensor("hessian", hessian, ndim=2, dtypes=(torch.float32,), shape=(features, features), device=weight.device)
    check_tensor("mask", mask, ndim=2, dtypes=(torch.bool,), shape=tuple(weight.shape), device=weight.device)
    check_scales(scales, weight)
    check_whole("passes", passes, 0)
    _op(weight, residual, hessian, mask, scales, passes)
    return weight


def reference(
    weight: torch.Tensor,
    residual: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor,
    scales: torch.Tensor,
    passes: int = 1,
) -> None:
    for name, value in (("weight", weight), ("residual", residual), ("hessian", hessian), ("scales", scales)):
        check_finite(name, value)
    scale = scales.to(weight.dtype)
    for _ in range(passes):
        for j in range(weight.shape[1]):
            if hessian[j, j] > 0:
                best = nearest_multiple(weight[:, j] - residual[:, j] / hessian[j, j], scale[:, j // COLUMNS])
                change = (best - weight[:, j]).masked_fill(~mask[:, j], 0)
                weight[:, j] = torch.where(mask[:, j], best, weight[:, j])
                residual += change[:, None] * hessian[j]


def _fake(weight, residual, hessian, mask, scales, passes=1):
    torch._check(weight.dim() == 2)


def _samples(generator: torch.Generator):
    for rows, columns in ((5, 24), (33, 72), (16, 136)):
        target, hessian, mask, scales = problem(rows, columns, generator)
        weight = nearest_multiple(target, scales.float().repeat_interleave(COLUMNS, 1)[:, :columns]) * mask
        yield sample(weight, (weight - target) @ hessian, hessian, mask, scales, 2)


_op = define_op("quantize_descent_", SCHEMA, reference=reference, fake=_fake, samples=_samples)
