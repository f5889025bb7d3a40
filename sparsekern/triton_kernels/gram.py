"""`gram_` in Triton: one triangle of `x^T x` on the tensor cores. The kernel and its floor are in `_product.py`."""

from __future__ import annotations

import functools

import torch

from . import _product


def gram_(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> None:
    """The op `gram_`; what is above the diagonal stays as it is."""
    _product.add_product_over_rows(gram, x, x, row_mask=row_mask, alpha=alpha, lower=True, names=("gram", "x", "x"))


compile_cases = functools.partial(_product.compile_cases, lower=True)
