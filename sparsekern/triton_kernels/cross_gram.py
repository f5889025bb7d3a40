"""`cross_gram_` in Triton. Floor: `2 * tokens * p * q` operations at 790 TFLOP/s. The kernel is in `_product.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import _product
from ._common import CompileCase


def cross_gram_(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0
) -> None:
    """Run the op `cross_gram_`; see `sparsekern.ops.cross_gram_`."""
    _product.add_product_over_rows(cross, x, y, row_mask=row_mask, alpha=alpha, names=("cross", "x", "y"))


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations for devices of `capability`. float16 differs from bfloat16 only in the type, as in `gram`."""
    yield from _product.compile_cases(capability, (torch.bfloat16, torch.float32))
