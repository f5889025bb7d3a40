"""A float32 product with the error of float32 on the tensor cores, which cuBLAS has only without them.

Floor, on an H200: three TF32 products, 131 TFLOP/s at the most; cuBLAS's float32 makes about 50. The kernel is in `_product.py`.
`[4096, k] @ [k, 128]` has 32 tiles, so its depth is split over 128 of the 132 multiprocessors.
"""

from __future__ import annotations

import functools

import torch

from . import _product


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1.0) -> None:
    """`out += alpha * a @ b`, deterministically.

    Args:
        out: `[rows, columns]` float32, updated in place.
        a: `[rows, depth]` float32.
        b: `[depth, columns]` float32.
        alpha: scale of the product.

    Parts of larger row-major matrices are read and written where they lie; fastest where they begin and their rows follow each other
    at multiples of four elements. Other strides cost a copy.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    _product.add_product_over_rows(out, a, b, alpha=alpha, turned=True, names=("out", "a", "b"))


compile_cases = functools.partial(_product.compile_cases, dtypes=(torch.float32,), masks=False, turned=True)
