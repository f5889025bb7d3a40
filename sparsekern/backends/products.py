"""Products in full float32 on a CUDA device, for implementations whose loop runs on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TENSOR_CORES_FROM = math.inf  # multiply-adds of a product; not measured, so that cuBLAS computes every product


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in float32 products inside the `with` block, whatever the user allows outside."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    """Add `left @ right`, of matrices or of batches of them, to `out` with the error of float32; `begins` treats `out` as zeros."""
    if out.dim() == 3:
        out.baddbmm_(left, right, beta=0.0 if begins else 1.0)
        return
    if product_for(len(left), *right.shape) == "cublas":
        out.addmm_(left, right, beta=0.0 if begins else 1.0)
        return
    from ..triton_kernels.matmul import add_product as add_on_tensor_cores

    if begins:
        out.zero_()
    add_on_tensor_cores(out, left, right)


def product_for(rows: int, depth: int, columns: int) -> str:
    """Return `"triton"` (tensor cores, three passes) if it is faster for a product of this size, else `"cublas"` (plain float32)."""
    return "triton" if rows * depth * columns >= TENSOR_CORES_FROM else "cublas"
