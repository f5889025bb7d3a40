"""Products of float32 matrices with the error of float32, for implementations whose loop runs on the host.

cuBLAS computes float32 products without tensor cores, on an H200 at some 50 TFLOP/s, or rounds both sides to TF32, at 400. A large product
is therefore three of TF32 pieces, `(high + low) (high' + low')` without `low low'`. Tensor cores cut off what float32 rounds, which biases
long sums, so that the large one of the three is added in chains. By count, [4096, 4096] by itself takes 1.0 ms of tensor cores and 0.5 ms to
add 16 chains, instead of 2.7 ms; nothing of this has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .devices import has_capability, has_triton

# Multiply-adds from which pieces save time by count. Below, ten launches more cost what the tensor cores save.
PIECES_FROM = 1 << 33
CHAIN = 256  # depth whose error is at most twice that of a sum in float32


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in float32 products inside the `with` block, whatever the user allows outside.

    PyTorch has one such setting for all threads of a process, so that those multiply in the same way meanwhile.
    """
    with _precision("ieee"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    """Add `left @ right`, of matrices or of batches of them, to `out` with the error of float32; `begins` treats `out` as zeros.

    The caller disables TF32, by `full_float32`.
    """
    if has_pieces(out, left.shape[-1]):
        _add_pieces(out, left, right, begins)
    else:
        _add(out, left, right, begins)


def has_pieces(out: torch.Tensor, depth: int) -> bool:
    """Return whether a product with the result `out` is computed from pieces."""
    large = out.shape[-2] * depth * out.shape[-1] >= PIECES_FROM
    return large and out.is_cuda and has_capability(out.device, (8, 0)).ok and has_triton().ok


def _add(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    add = out.baddbmm_ if out.dim() == 3 else out.addmm_
    add(left, right, beta=0.0 if begins else 1.0)


def _add_pieces(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
    """Add the small products, then the large one in chains: between them float32 rounds, without a bias."""
    from ..triton_kernels.pieces import split_in_two

    (high, low), (right_high, right_low) = split_in_two(left), split_in_two(right)
    with _precision("tf32"):
        _add(out, low, right_high, begins)
        _add(out, high, right_low, False)
        for begin in range(0, left.shape[-1], CHAIN):
            _add(out, high[..., begin : begin + CHAIN], right_high[..., begin : begin + CHAIN, :], False)
