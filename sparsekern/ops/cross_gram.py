"""`cross_gram_`: products of inputs and targets, or of two layers' inputs, for least squares, accumulated batch by batch."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_finite_number, check_row_mask, check_tensor
from ._registry import define_op, sample

SCHEMA = "(Tensor(a!) cross, Tensor x, Tensor y, *, Tensor? row_mask=None, float alpha=1.0) -> ()"
TOKENS = 4096  # tokens that the reference converts to float32 at a time


def cross_gram_(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """Add `alpha * x^T y` to `cross`, in place.

    16-bit inputs are multiplied exactly and accumulated in float32. With outputs for `x` and inputs for `y` the result is the `cross` of
    `gram_solve`. Products too large for float32 are not an error: they leave Inf in `cross`, or on a GPU NaN.

    On a CPU this is PyTorch's own float32 product, a few thousand tokens at a time, so that 16-bit inputs are never converted as a whole.

    Args:
        cross: `[p, q]` float32, updated in place.
        x: `[tokens, p]` float32, bfloat16 or float16, any strides.
        y: `[tokens, q]` of the dtype of `x`, any strides.
        row_mask: `[tokens]` bool; rows that are False (padding) are skipped. None uses all rows.
        alpha: scale of the products.

    Returns:
        `cross`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; NaN or Inf in `alpha` or in a used row of `x` or `y`. On a CPU `cross` is then unchanged;
            on a CUDA device it is undefined, as with `gram_`.

    Source: the normal equations `W = (y^T x)(x^T x)^-1`.
    """
    check_tensor("cross", cross, ndim=2, dtypes=(torch.float32,))
    check_tensor("x", x, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, cross.shape[0]), device=cross.device)
    check_tensor("y", y, ndim=2, dtypes=(x.dtype,), shape=(x.shape[0], cross.shape[1]), device=cross.device)
    check_row_mask(row_mask, x)
    check_finite_number("alpha", alpha)
    _op(cross, x, y, row_mask=row_mask, alpha=alpha)
    return cross


def reference(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0
) -> None:
    check_finite("x", x, row_mask)
    check_finite("y", y, row_mask)
    for start in range(0, len(x), TOKENS):
        rows = slice(start, start + TOKENS)
        a, b = x[rows], y[rows]
        if row_mask is not None:
            a, b = a[row_mask[rows]], b[row_mask[rows]]
        cross.addmm_(a.float().T, b.float(), alpha=alpha)


def _fake(cross, x, y, *, row_mask=None, alpha=1.0) -> None:
    torch._check(cross.dim() == x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0])
    torch._check(cross.shape[0] == x.shape[1] and cross.shape[1] == y.shape[1])


def _samples(generator: torch.Generator):
    for tokens, p, q, dtype in ((37, 24, 70, torch.float32), (64, 33, 8, torch.bfloat16), (5, 70, 33, torch.float16)):
        x = torch.randn(tokens, p, generator=generator).to(dtype)
        y = torch.randn(tokens, q, generator=generator).to(dtype)
        yield sample(torch.zeros(p, q), x, y)
        yield sample(torch.ones(p, q), x.T.contiguous().T, y, row_mask=torch.arange(tokens) % 3 > 0, alpha=0.5)


_op = define_op("cross_gram_", SCHEMA, reference=reference, fake=_fake, samples=_samples, native=False)
