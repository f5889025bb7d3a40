"""`obs_quantize`: round kept weights to 4 bits and compensate each rounding in the weights not yet visited, using one factor."""

from __future__ import annotations

import torch

from .._checks import check_finite, check_square, check_tensor
from ..layouts.nm_q4 import COLUMNS, nearest_multiple
from ._registry import define_op, sample

SCHEMA = "(Tensor weight, Tensor factor, Tensor mask, Tensor scales) -> (Tensor new_weight, Tensor row_error)"


def obs_quantize(
    weight: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns from left to right to multiples of their scales, and compensate in the columns to the right.

    It is `obs_sweep` with a given mask, in which a kept weight becomes the nearest of -8 to 7 times its scale. The compensation of
    pruned weights goes on as there.

    Args:
        weight: `[out_features, in_features]` float32.
        factor: `[in_features, in_features]` float32 upper triangular, from `reverse_cholesky`.
        mask: `[out_features, in_features]` bool, True where kept.
        scales: `[out_features, ceil(in_features / 64)]` float16, one for each row and 64 columns.

    Returns:
        new_weight: `[out_features, in_features]` float32, scales times whole numbers; 0 where pruned, and at dead features.
        row_error: `[out_features]` float32, the squared error of each row in the damped Gram matrix.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices; a value that is not finite.

    Source: Frantar et al., GPTQ, 2022, algorithm 1, with the mask of Frantar and Alistarh, SparseGPT, 2023, equation 7.
    """
    check_tensor("weight", weight, ndim=2, dtypes=(torch.float32,))
    check_square("factor", factor)
    features = weight.shape[1]
    check_tensor("factor", factor, ndim=2, dtypes=(torch.float32,), shape=(features, features), device=weight.device)
    check_tensor("mask", mask, ndim=2, dtypes=(torch.bool,), shape=tuple(weight.shape), device=weight.device)
    check_scales(scales, weight)
    return _op(weight, factor, mask, scales)


def check_scales(scales: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `scales` are float16, one for each row and 64 columns of `weight`."""
    shape = (weight.shape[0], -(-weight.shape[1] // COLUMNS))
    check_tensor("scales", scales, ndim=2, dtypes=(torch.float16,), shape=shape, device=weight.device)


def reference(
    weight: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, value in (("weight", weight), ("factor", factor), ("scales", scales)):
        check_finite(name, value)
    scale = scales.to(weight.dtype)
    new_weight, delta = torch.zeros_like(weight), torch.zeros_like(weight)
    row_error = weight.new_zeros(len(weight))
    for j in range(weight.shape[1]):
        if torch.signbit(factor[j, j]):
            continue  # a dead feature
        now = weight[:, j] + delta[:, :j] @ factor[:j, j] / factor[j, j]
        new_weight[:, j] = nearest_multiple(now, scale[:, j // COLUMNS]).masked_fill(~mask[:, j], 0)
        delta[:, j] = weight[:, j] - new_weight[:, j]
        row_error += ((now - new_weight[:, j]) * factor[j, j]) ** 2
    return new_weight, row_error


def _fake(weight, factor, mask, scales):
    torch._check(weight.dim() == 2)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def problem(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return a weight, a positive definite matrix, a mask and scales."""
    x = torch.randn(2 * columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) > 0.5
    scales = (torch.rand(rows, -(-columns // COLUMNS), generator=generator) * 0.3 + 0.2).half()
    return weight, x.T @ x / columns + torch.eye(columns), mask, scales


def _samples(generator: torch.Generator):
    for rows, columns in ((5, 24), (33, 72), (16, 136)):
        weight, hessian, mask, scales = problem(rows, columns, generator)
        factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()
        yield sample(weight, factor, mask, scales)


_op = define_op("obs_quantize", SCHEMA, reference=reference, fake=_fake, samples=_samples)
