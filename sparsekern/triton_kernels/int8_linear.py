"""`int8_linear` in Triton: a product with 8-bit values that the tensor cores take as values of the dtype of `x`.

Floor for up to 16 tokens: the bytes of the weight; a head of 128,256 x 4,096 is 525 MB, 0.11 ms of an H200. A program reads whole rows, and
its warps share their columns. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of
from ._packed_linear import DTYPES, add_products, as_bias, as_matrix, store_product


class Config(NamedTuple):
    """The shape of a program.

    Attributes:
        tokens: tokens of a program.
        rows: rows of a program.
        columns: columns that a piece multiplies at a time.
        pieces: pieces of the columns, which are summed at the end.
        warps: warps of a program.
    """

    tokens: int
    rows: int
    columns: int
    pieces: int
    warps: int


FEW = Config(tokens=16, rows=16, columns=128, pieces=4, warps=4)
MANY = Config(tokens=64, rows=64, columns=64, pieces=1, warps=4)


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x, values, scales, bias, y, tokens, columns, rows, x_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by some tokens."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    present = token < tokens
    row, piece = first + tl.arange(0, ROWS)[:, None, None], tl.arange(0, PIECES)[None, :, None]
    sums = tl.zeros([PIECES, ROWS, TOKENS], tl.float32)
    for step in range(0, tl.cdiv(columns, PIECES * COLUMNS)):
        column = (step * PIECES + piece) * COLUMNS
        own = column + tl.arange(0, COLUMNS)[None, None, :]
        stored = tl.load(values + row * columns + own, mask=(own < columns) & (row < rows), other=0)
        weight = stored.to(tl.float32).to(x.dtype.element_ty)  # exact; the interpreter converts no integers to bfloat16
        sums = add_products(sums, weight, x, column, columns, token.to(tl.int64) * x_stride, present, TOKENS)
    row = first + tl.arange(0, ROWS)
    product = tl.sum(sums, axis=0) * tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    store_product(product, y, bias, None, first, rows, token.to(tl.int64) * rows, present, ROWS)


def int8_linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x W^T + b`, `[..., rows]`; the arguments are those of the op.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    rows = len(values)
    y = x.new_empty((*x.shape[:-1], rows))
    x, bias = as_matrix(x), as_bias(bias, (rows,), x)
    tokens, columns = x.shape
    check_operand("values", values, x, (rows, columns), (torch.int8,))
    check_operand("scales", scales, x, (rows,))
    if tokens and rows:
        used = FEW if tokens <= FEW.tokens else MANY
        with on_device_of(x):
            multiply[(triton.cdiv(rows, used.rows), triton.cdiv(tokens, used.tokens))](
                x, values.contiguous(), scales.contiguous(), bias, y, tokens, columns, rows, x.stride(0), **_constants(used),
                num_warps=used.warps, num_stages=2,
            )  # fmt: skip
    return y


def _constants(used: Config) -> dict[str, int]:
    return {"TOKENS": used.tokens, "ROWS": used.rows, "COLUMNS": used.columns, "PIECES": used.pieces}


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the configurations of the kernel, the same for every device; all multiply by `mma.sync`, as batches of tiles do."""
    numbers = dict.fromkeys(("columns", "rows", "x_stride"), "i32:16") | {"tokens": "i32"}
    for dtype, used in ((torch.bfloat16, FEW), (torch.float32, FEW), (torch.bfloat16, MANY)):
        own = f"*{DTYPES[dtype]}:16"
        pointers = {"x": own, "values": "*i8:16", "scales": "*fp32:16", "bias": own, "y": own}
        yield CompileCase(multiply, {**pointers, **numbers}, _constants(used), used.warps, 2)
