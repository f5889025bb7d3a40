"""What the products from packed weights, `bitmask_linear` and `nm_linear`, share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import check_operand

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MOST_TOKENS = 16  # that are multiplied by a weight as it lies packed; as many as a tile of the tensor cores takes
COLUMNS = 128  # that a warp expands at a time, 4 a thread


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """`[..., features]` as `[tokens, features]` with contiguous rows, copied only where its strides ask for it."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    check_operand("x", x, x, tuple(x.shape), DTYPES)
    return x if x.stride(1) == 1 else x.contiguous()


def as_bias(bias: torch.Tensor | None, rows: int, x: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    check_operand("bias", bias, x, (rows,), (x.dtype,))
    return bias.contiguous()


def warps_for(tiles: int, columns: int, most: tuple[int, ...], multiprocessors: int) -> int:
    """Warps of a program that expands a tile of rows, whose columns they share.

    `most[w]` is for `w + 1` tiles a multiprocessor, the last of them for more: what its registers have room for is one program's
    where there are few tiles, and else several's. No warp is without columns.
    """
    waves = triton.cdiv(tiles, multiprocessors)
    return min(most[min(waves, len(most)) - 1], triton.next_power_of_2(max(1, triton.cdiv(columns, COLUMNS))))


@triton.jit
def side_by_side(a, b, c, d, ROWS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    """Every fourth column each, `[ROWS, PIECES, COLUMNS // 4]`, in the order of the columns."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, PIECES, COLUMNS)


@triton.jit
def add_products(sums, weight, x, column, tokens, columns, x_stride, TOKENS: tl.constexpr):
    """`sums`, `[pieces, rows, TOKENS]`, with the products of the pieces of `weight`, `[rows, pieces, columns]`, that begin at `column`."""
    token = tl.arange(0, TOKENS)[:, None, None]
    column += tl.arange(0, weight.shape[2])[None, None, :]
    factors = tl.load(x + token.to(tl.int64) * x_stride + column, mask=(token < tokens) & (column < columns), other=0.0)
    return tl.dot(weight.permute(1, 0, 2), factors.permute(1, 2, 0), sums, input_precision="tf32x3")


@triton.jit
def store_product(sums, y, bias, order, first, rows, tokens, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """`sums`, `[ROWS, TOKENS]`, and the bias to where they belong in `y`, `[tokens, rows]`; `order` None: as the rows come."""
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    if order is not None:
        row = tl.load(order + row, mask=inside, other=0).to(tl.int64)
        inside &= (row >= 0) & (row < rows)
    if bias is not None:
        sums += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    token = tl.arange(0, TOKENS)
    place = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside[:, None] & (token < tokens)[None, :])
