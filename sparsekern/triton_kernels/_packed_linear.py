"""Helpers shared by the products with packed weights, of `bitmask_linear`, `nm_linear` and those of experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import check_operand

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MOST_TOKENS = 16  # largest batch multiplied without unpacking the weight: one tensor-core tile
COLUMNS = 128  # columns expanded by a warp at a time, 4 per thread


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, `[..., features]`, as `[tokens, features]` with contiguous rows; copies only if its strides require it.

    Raises:
        ValueError: a dtype that the kernels do not take.
    """
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    check_operand("x", x, x, tuple(x.shape), DTYPES)
    return x if x.stride(1) == 1 else x.contiguous()


def as_bias(bias: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor) -> torch.Tensor | None:
    """Return `bias`, of this shape and of the dtype of `x`, contiguous; None stays None.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if bias is None:
        return None
    check_operand("bias", bias, x, shape, (x.dtype,))
    return bias.contiguous()


def warps_for(tiles: int, columns: int, most: tuple[int, ...], multiprocessors: int) -> int:
    """Return the number of warps of a program that expands a tile of rows; the warps share its columns.

    Args:
        tiles: number of tiles of rows.
        columns: width of the weight. No warp is left without columns.
        most: `most[i]` is the limit for `i + 1` tiles per multiprocessor, and its last entry for more. With few tiles one program
            has all registers of a multiprocessor; with more, several programs share them.
        multiprocessors: of the device.
    """
    waves = triton.cdiv(tiles, multiprocessors)
    return min(most[min(waves, len(most)) - 1], triton.next_power_of_2(max(1, triton.cdiv(columns, COLUMNS))))


@triton.jit
def side_by_side(a, b, c, d, ROWS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    """Interleave four tensors of every fourth column, `[ROWS, PIECES, COLUMNS // 4]` each, into `[ROWS, PIECES, COLUMNS]`."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, PIECES, COLUMNS)


@triton.jit
def add_products(sums, weight, x, column, columns, x_row, present, TOKENS: tl.constexpr):
    """Add the products of a part of the weight with its columns of `x` to `sums`.

    `sums` is `[pieces, rows, TOKENS]`; `weight` is `[rows, pieces, columns]`, and each piece begins at its entry of `column`. The rows
    of the tokens begin at `x_row` in `x`; those of tokens that are not `present` are not read.
    """
    column += tl.arange(0, weight.shape[2])[None, None, :]
    place = x + x_row[:, None, None] + column
    factors = tl.load(place, mask=present[:, None, None] & (column < columns), other=0.0)
    return tl.dot(weight.permute(1, 0, 2), factors.permute(1, 2, 0), sums, input_precision="tf32x3")


@triton.jit
def store_product(sums, y, bias, order, first, rows, y_row, present, ROWS: tl.constexpr):
    """Store `sums`, `[ROWS, tokens]`, plus the bias, in the rows of `y` that begin at `y_row`, for each token that is `present`.

    `order` gives the row of the weight for each packed row; None keeps the order of the rows.
    """
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    if order is not None:
        row = tl.load(order + row, mask=inside, other=0).to(tl.int64)
        inside &= (row >= 0) & (row < rows)
    if bias is not None:
        sums += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = y + y_row[None, :] + row[:, None]
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside[:, None] & present[None, :])
