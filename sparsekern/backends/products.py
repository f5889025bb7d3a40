"""Products of float32 matrices with the error of float32, for implementations whose loop runs on the host.

cuBLAS computes float32 products without tensor cores, on an H200 at some 50 TFLOP/s, and products of bfloat16 at 790. Three bfloat16 make
a float32. A large product is therefore the sum of six products of such pieces. The three smallest are left out: they are below what float32
rounds. That is independent of whether the user allows TF32, which is a setting of the whole process. Tensor cores cut off what float32 rounds, which
biases long sums, so that the largest of the six is added in chains. By count, [4096, 4096] by itself takes 1.0 ms of tensor cores and
0.3 ms to add ten sums, instead of 2.7 ms; nothing of this has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .devices import has_capability, has_triton

# Multiply-adds from which pieces save time by count. Below, ten launches more cost what the tensor cores save.
PIECES_FROM = 1 << 33
CHAIN = 512  # depth whose error is at most twice that of a sum in float32
VECTOR = 8  # bfloat16 numbers that tensor-core kernels load at once


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in float32 products inside the `with` block, whatever the user allows outside.

    PyTorch has one such setting for all threads of a process. Products of other threads are not rounded meanwhile either.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    """Add `left @ right`, of matrices or of batches of them, to `out` with the error of float32; `begins` treats `out` as zeros.

    The caller disables TF32, by `full_float32`, for products that are not computed from pieces.
    """
    if has_pieces(out, left.shape[-1]):
        _add_from_pieces(out, left, right, begins)
    else:
        add = out.baddbmm_ if out.dim() == 3 else out.addmm_
        add(left, right, beta=0.0 if begins else 1.0)


def has_pieces(out: torch.Tensor, depth: int) -> bool:
    """Return whether a product with the result `out` is computed from pieces."""
    large = out.shape[-2] * depth * out.shape[-1] >= PIECES_FROM and depth % VECTOR == out.shape[-1] % VECTOR == 0
    return large and out.is_cuda and has_capability(out.device, (8, 0)).ok and has_triton().ok


def _add_from_pieces(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    """Add six products, the smallest first, and the largest in chains: between them float32 rounds, without a bias."""
    from ..triton_kernels.pieces import split_in_three

    depth = left.shape[-1]
    lefts, rights = split_in_three(left, -1), split_in_three(right, -2, rising=True)  # high, middle, low; low, middle, high
    _add_bf16(out, lefts, rights, begins)
    _add_bf16(out, lefts[..., : 2 * depth], rights[..., depth:, :], False)
    high, right_high = lefts[..., :depth], rights[..., 2 * depth :, :]
    for begin in range(0, depth, CHAIN):
        _add_bf16(out, high[..., begin : begin + CHAIN], right_high[..., begin : begin + CHAIN, :], False)


def _add_bf16(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    add = torch.baddbmm if out.dim() == 3 else torch.addmm
    add(out, left, right, out_dtype=torch.float32, beta=0.0 if begins else 1.0, out=out)
