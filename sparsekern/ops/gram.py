"""`gram_`: the Gram matrix (layer-wise Hessian) of a linear layer's inputs, accumulated batch by batch."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_finite_number, check_row_mask, check_square, check_tensor
from ._registry import define_op, sample

SCHEMA = "(Tensor(a!) gram, Tensor x, *, Tensor? row_mask=None, float alpha=1.0) -> ()"


def gram_(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> torch.Tensor:
    """Add `alpha * x^T x` to the lower triangle of `gram`, in place.

    Only the lower triangle, with the diagonal, is computed and valid afterwards; `gram_symmetrize_` mirrors it once at the end. 16-bit
    inputs are multiplied exactly and accumulated in float32, without scaling before the product. Products too large for float32 are no
    error: they leave Inf in `gram`, or on a GPU NaN. `reverse_cholesky` refuses both.

    Args:
        gram: `[features, features]` float32, updated in place.
        x: `[tokens, features]` float32, bfloat16 or float16, any strides.
        row_mask: `[tokens]` bool; rows that are False (padding) are skipped. None uses all rows.
        alpha: scale of the products.

    Returns:
        `gram`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; NaN or Inf in `alpha` or in a used row of `x`. On a CPU `gram` is then unchanged. On a
            CUDA device it is undefined: the Triton kernel does not read `x` twice, but finds them in the diagonal of the result.

    Source: `H = X^T X`, Frantar and Alistarh, SparseGPT, 2023, section 3.
    """
    check_square("gram", gram)
    check_tensor("x", x, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, gram.shape[0]), device=gram.device)
    check_row_mask(row_mask, x)
    check_finite_number("alpha", alpha)
    _op(gram, x, row_mask=row_mask, alpha=alpha)
    return gram


def reference(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> None:
    check_finite("x", x, row_mask)
    if row_mask is not None:
        x = x[row_mask]
    x = x.float()
    gram += torch.tril(x.T @ x).mul_(alpha)


def _fake(gram, x, *, row_mask=None, alpha=1.0) -> None:
    torch._check(gram.dim() == 2 and x.dim() == 2 and gram.shape[0] == gram.shape[1] == x.shape[1])


def _samples(generator: torch.Generator):
    for tokens, features, dtype in ((37, 24, torch.float32), (64, 33, torch.bfloat16), (5, 70, torch.float16)):
        x = torch.randn(tokens, features, generator=generator).to(dtype)
        yield sample(torch.zeros(features, features), x)
        yield sample(torch.zeros(features, features), x.T.contiguous().T, row_mask=torch.arange(tokens) % 3 > 0, alpha=0.5)


_op = define_op("gram_", SCHEMA, reference=reference, fake=_fake, samples=_samples)
