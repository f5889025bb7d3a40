"""`gram_` in Triton: one triangle of `x^T x` on the tensor cores. The kernel and its floor are in `_product.py`."""

from __future__ import annotations

import functools

import torch

from . import _product


def gram_(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> None:
    """Run the op `gram_`, which leaves entries above the diagonal unchanged; see `sparsekern.ops.gram_`."""
    _product.add_product_over_rows(gram, x, x, row_mask=row_mask, alpha=alpha, lower=True, names=("gram", "x", "x"))


compile_cases = functools.partial(_product.compile_cases, lower=True)
