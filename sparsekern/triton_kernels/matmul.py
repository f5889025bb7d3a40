"""A float32 product on the tensor cores with the error of float32, in one kernel.

`backends.products` computes it by cuBLAS, from pieces; a benchmark compares the two.

Floor, on an H200: three TF32 products, at most 131 TFLOP/s. The kernel is in `_product.py`.
`[4096, k] @ [k, 128]` has 32 tiles, so its depth is split over 128 of the 132 multiprocessors.
"""

from __future__ import annotations

import functools

import torch

from . import _product


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1.0) -> None:
    """Add `alpha * a @ b` to `out`, deterministically.

    Views into larger row-major matrices are read and written in place. They are fastest if they begin, and their rows follow each
    other, at multiples of four elements. Other strides cost a copy.

    Args:
        out: `[rows, columns]` float32, updated in place.
        a: `[rows, depth]` float32.
        b: `[depth, columns]` float32.
        alpha: scale of the product.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    _product.add_product_over_rows(out, a, b, alpha=alpha, turned=True, names=("out", "a", "b"))


compile_cases = functools.partial(_product.compile_cases, dtypes=(torch.float32,), masks=False, turned=True)
