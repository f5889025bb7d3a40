"""`feature_norm_`: running sum of squares, and optionally the sum, of each input feature."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_row_mask, check_tensor
from ._registry import define_op, sample

SCHEMA = "(Tensor(a!) sum_squares, Tensor x, *, Tensor? row_mask=None, Tensor(b!)? sum=None) -> ()"


def feature_norm_(
    sum_squares: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, sum: torch.Tensor | None = None
) -> torch.Tensor:
    """Add each feature's sum of squares over the tokens of `x` to `sum_squares`, in place; its square root is the feature's norm.

    Args:
        sum_squares: `[features]` float32, updated in place.
        x: `[tokens, features]` float32, bfloat16 or float16, any strides.
        row_mask: `[tokens]` bool; rows that are False (padding) are skipped. None uses all rows.
        sum: `[features]` float32; if given, the sum over tokens is added to it in the same pass.

    Returns:
        `sum_squares`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; NaN or Inf in a used row of `x`. Nothing is then changed.

    Source: the activation norm of Sun et al., Wanda, 2023, section 3.
    """
    check_tensor("sum_squares", sum_squares, ndim=1, dtypes=(torch.float32,))
    check_tensor("x", x, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, sum_squares.shape[0]), device=sum_squares.device)
    check_row_mask(row_mask, x)
    if sum is not None:
        check_tensor("sum", sum, ndim=1, dtypes=(torch.float32,), shape=tuple(sum_squares.shape), device=x.device)
    _op(sum_squares, x, row_mask=row_mask, sum=sum)
    return sum_squares


def reference(sum_squares, x, *, row_mask=None, sum=None) -> None:
    check_finite("x", x, row_mask)
    if row_mask is not None:
        x = x[row_mask]
    x = x.float()
    sum_squares += x.square().sum(0)
    if sum is not None:
        sum += x.sum(0)


def _fake(sum_squares, x, *, row_mask=None, sum=None) -> None:
    torch._check(sum_squares.dim() == 1 and x.dim() == 2 and sum_squares.shape[0] == x.shape[1])


def _samples(generator: torch.Generator):
    for tokens, features, dtype in ((37, 24, torch.float32), (64, 33, torch.bfloat16), (5, 70, torch.float16)):
        x = torch.randn(tokens, features, generator=generator).to(dtype)
        yield sample(torch.zeros(features), x)
        yield sample(torch.zeros(features), x.T.contiguous().T, row_mask=torch.arange(tokens) % 3 > 0, sum=torch.ones(features))


_op = define_op("feature_norm_", SCHEMA, reference=reference, fake=_fake, samples=_samples)
