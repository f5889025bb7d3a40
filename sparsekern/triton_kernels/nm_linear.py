"""`nm_linear` in Triton: up to 16 tokens times the packed weight; for more tokens the weight is unpacked first.

Floor, on an H200: the packed bytes at 4.8 TB/s. 2:4 16-bit values of [4096, 4096], 18.9 MB, take 3.9 us, the dense weight 7.0 us. That
leaves 13.8 instructions per stored value, or 24.6 in the time of the dense weight. For compute capability 9.0 and bfloat16 ptxas emits:

* One token: 17.7 per value for every pattern. Values are not spread to their columns; their factors are gathered from `x`. A thread has
  one position in every row of its program, so that the first column of its group is computed once for all rows. With 2:4 the threads of
  a warp gather from 64 neighbouring columns.
* More tokens, 16-bit values and M of 4: 24 for any number of tokens. A thread expands a group of every row for the tensor cores.
* More tokens otherwise: 22 for 2 tokens and 76 for 16. Factors are gathered from a transposed `x`, so that one read fetches all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layouts.packed_rows import BLOCK_SLOTS, block_values, code_bits, stored_per_row
from ._common import CompileCase, check_operand, device_of, on_device_of
from ._packed_linear import COLUMNS, DTYPES, MOST_TOKENS, add_products, as_bias, as_matrix, side_by_side, store_product, warps_for

TILE = 16  # rows expanded together: a tile of the tensor cores
WARPS = (8, 4)  # most warps of such a tile; see `warps_for`


class Config(NamedTuple):
    """The shape of a program.

    Attributes:
        rows: rows per program.
        warps: warps per program; each takes 32 values of a row at a time.
    """

    rows: int
    warps: int


def config(rows: int, kept: int, tokens: int, multiprocessors: int) -> Config:
    """Return the shape of a program for rows of `kept` values.

    More rows share more work, more tokens leave registers for fewer rows, and every multiprocessor should have a program.
    """
    most = 16 if tokens <= 2 else 8 if tokens <= 4 else 4
    while most > 4 and triton.cdiv(rows, most) < multiprocessors:
        most //= 2
    return Config(most, min(8, triton.next_power_of_2(max(1, triton.cdiv(kept, 32)))))


@triton.jit
def stored_value(values, codes, row, k, inside, stored, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """Return value `k` of each row, and its position in its group."""
    place = k // BLOCK * BLOCK + k % BLOCK_SLOTS * (BLOCK // BLOCK_SLOTS) + k % BLOCK // BLOCK_SLOTS
    value = tl.load(values + row * stored + place, mask=inside, other=0.0)
    code = tl.load(codes + row * (stored * BITS // 32) + k * BITS // 32, mask=inside, other=0)
    return value, (code >> (k * BITS % 32)) & ((1 << BITS) - 1)


@triton.jit
def multiply_picked(
    x, values, codes, first, columns, rows, kept, stored, x_row, pitch,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Return the products of some rows with all tokens, `[ROWS, TOKENS]`, gathering the factor of each value.

    The factors of a token begin at `x_row` in `x`, those of neighbouring columns are `pitch` apart. All tokens are read.
    """
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, VALUES)[None, :]
    sums = tl.zeros([ROWS, VALUES, TOKENS], tl.float32)
    for begin in range(0, kept, VALUES):
        k = begin + lane
        value, position = stored_value(values, codes, row, k, (k < kept) & (first + row < rows), stored, BITS, BLOCK, BLOCK_SLOTS)
        column = (k // N * M + position)[:, :, None]
        factor = tl.load(x + column * pitch + x_row[None, None, :], mask=column < columns, other=0.0)
        sums += value.to(tl.float32)[:, :, None] * factor.to(tl.float32)
    return tl.sum(sums, axis=1)


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x, values, codes, bias, y, tokens, columns, rows, kept, stored,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by all tokens, gathering from `x`, `[columns, TOKENS]`."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    values += first * stored
    codes += first * (stored * BITS // 32)
    token = tl.arange(0, TOKENS)
    sums = multiply_picked(
        x, values, codes, first, columns, rows, kept, stored, token, TOKENS, N, M, BITS, BLOCK, BLOCK_SLOTS, TOKENS, ROWS, VALUES
    )
    store_product(sums, y, bias, None, first, rows, token.to(tl.int64) * rows, token < tokens, ROWS)


@triton.jit
def multiply_expanded(
    x, values, codes, first, columns, rows, stored, x_row, present,
    N: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the products of some rows with all tokens, `[ROWS, TOKENS]`, expanding groups of 4 columns for the tensor cores.

    The tokens are `x_row` and `present` of `add_products`.
    """
    row, piece = tl.arange(0, ROWS)[:, None, None], tl.arange(0, PIECES)[None, :, None]
    lane = tl.arange(0, COLUMNS // 4)[None, None, :]
    sums = tl.zeros([PIECES, ROWS, TOKENS], tl.float32)
    for step in range(0, tl.cdiv(columns, PIECES * COLUMNS)):
        column = (step * PIECES + piece) * COLUMNS
        group = column // 4 + lane
        inside = (group * 4 < columns) & (first + row < rows)
        a = tl.zeros([ROWS, PIECES, COLUMNS // 4], values.dtype.element_ty)
        b, c, d = a, a, a
        for i in tl.static_range(N):
            value, position = stored_value(values, codes, row, group * N + i, inside, stored, BITS, BLOCK, BLOCK_SLOTS)
            a = tl.where(position == 0, value, a)
            b = tl.where(position == 1, value, b)
            c = tl.where(position == 2, value, c)
            d = tl.where(position == 3, value, d)
        sums = add_products(sums, side_by_side(a, b, c, d, ROWS, PIECES, COLUMNS), x, column, columns, x_row, present, TOKENS)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["tokens"])
def multiply_fours(
    x, values, codes, bias, y, tokens, columns, rows, x_stride, stored,
    N: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by all tokens, at most `TOKENS`, expanding groups of 4 columns."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    values += first * stored
    codes += first * (stored * BITS // 32)
    token = tl.arange(0, TOKENS)
    present = token < tokens
    sums = multiply_expanded(
        x, values, codes, first, columns, rows, stored, token.to(tl.int64) * x_stride, present,
        N, BITS, BLOCK, BLOCK_SLOTS, TOKENS, PIECES, ROWS, COLUMNS,
    )  # fmt: skip
    store_product(sums, y, bias, None, first, rows, token.to(tl.int64) * rows, present, ROWS)


@triton.jit
def unpack(
    values, codes, weight, columns, rows, kept, stored,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Write some rows of the dense weight: zeros, and then the values, while the second-level cache still has the zeros.

    By count, memory is therefore written once: 16 rows of 4096 columns on each of 132 multiprocessors are 17 MB, a third of that cache. Not
    run on a GPU.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    values += first * stored
    codes += first * (stored * BITS // 32)
    weight += first * columns
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, VALUES)[None, :]
    zeros = tl.zeros([ROWS, VALUES], weight.dtype.element_ty)
    for begin in range(0, columns, VALUES):
        tl.store(weight + row * columns + begin + lane, zeros, mask=(begin + lane < columns) & (first + row < rows))
    tl.debug_barrier()  # other threads store the values
    for begin in range(0, kept, VALUES):
        k = begin + lane
        inside = (k < kept) & (first + row < rows)
        value, position = stored_value(values, codes, row, k, inside, stored, BITS, BLOCK, BLOCK_SLOTS)
        column = k // N * M + position
        tl.store(weight + row * columns + column, value, mask=inside & (column < columns))


def product(x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x W^T + b`, `[..., rows]`, for up to `MOST_TOKENS` tokens.

    Args:
        x: `[..., columns]`, bfloat16, float16 or float32.
        values: `[rows, stored]` in the dtype of `x`, contiguous.
        codes: `[rows, stored * bits / 32]` int32, contiguous.
        n: values kept of each group.
        m: columns of a group.
        bias: `[rows]` in the dtype of `x`, or None.

    Raises:
        ValueError: more tokens, or shapes, dtypes or devices that do not match.
    """
    rows = len(values)
    y = x.new_empty((*x.shape[:-1], rows))
    x, bias = as_matrix(x), as_bias(bias, (rows,), x)
    tokens, columns = x.shape
    _check(values, codes, columns, n, m, x)
    if tokens > MOST_TOKENS:
        raise ValueError(f"x: expected at most {MOST_TOKENS} tokens, got {tokens}")
    if not tokens or not rows:
        return y
    shared = values, codes, bias, y, tokens, columns, rows
    with on_device_of(x):
        if tokens > 1 and m == 4 and x.dtype != torch.float32:
            warps = warps_for(triton.cdiv(rows, TILE), columns, WARPS, device_of(x).multiprocessors)
            multiply_fours[(triton.cdiv(rows, TILE),)](
                x, *shared, x.stride(0), values.shape[1], **_fours(values.dtype, n, warps), num_warps=warps, num_stages=1
            )
        else:
            kept, width = columns // m * n, triton.next_power_of_2(tokens)
            tiles = config(rows, kept, tokens, device_of(x).multiprocessors)
            multiply[(triton.cdiv(rows, tiles.rows),)](
                x if tokens == 1 else _turned(x, width), *shared, kept, values.shape[1],
                **_constants(values.dtype, n, m, tiles), TOKENS=width, num_warps=tiles.warps, num_stages=1,
            )  # fmt: skip
    return y


def _turned(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return `x` transposed and padded to `[features, width]`; the padding is multiplied but never stored."""
    tokens, features = x.shape
    turned = x.new_empty((features, width))
    turned[:, :tokens] = x.t()
    return turned


def unpacked(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, columns: int) -> torch.Tensor:
    """Return the dense weight, `[rows, columns]`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    rows = len(values)
    _check(values, codes, columns, n, m, values)
    weight = values.new_empty((rows, columns))
    if rows:
        kept = columns // m * n
        tiles = config(rows, kept, 1, device_of(values).multiprocessors)
        with on_device_of(values):
            unpack[(triton.cdiv(rows, tiles.rows),)](
                values, codes, weight, columns, rows, kept, values.shape[1], **_constants(values.dtype, n, m, tiles),
                num_warps=tiles.warps, num_stages=1,
            )  # fmt: skip
    return weight


def _check(values: torch.Tensor, codes: torch.Tensor, columns: int, n: int, m: int, x: torch.Tensor) -> None:
    """Raise if a packed tensor is smaller than the kernels assume, whatever it holds."""
    rows, stored = len(values), stored_per_row(columns, n, m, x.dtype)
    check_operand("values", values, x, (rows, stored), (x.dtype,))
    check_operand("codes", codes, x, (rows, stored * code_bits(m) // 32), (torch.int32,))


def layout_of(dtype: torch.dtype, n: int, m: int) -> dict[str, int]:
    """Return the constants of a kernel that say how values and codes are stored."""
    return {"N": n, "M": m, "BITS": code_bits(m), "BLOCK": block_values(dtype), "BLOCK_SLOTS": BLOCK_SLOTS}


def _constants(dtype: torch.dtype, n: int, m: int, tiles: Config) -> dict[str, int]:
    return {**layout_of(dtype, n, m), "ROWS": tiles.rows, "VALUES": 32 * tiles.warps}


def _fours(dtype: torch.dtype, n: int, warps: int) -> dict[str, int]:
    layout = layout_of(dtype, n, 4)
    del layout["M"]
    return {**layout, "TOKENS": MOST_TOKENS, "PIECES": warps, "ROWS": TILE, "COLUMNS": COLUMNS}


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the configurations of each kernel that need the most registers, the same for every device."""
    for dtype, n, m, tokens in ((torch.bfloat16, 2, 4, 1), (torch.bfloat16, 4, 8, 8), (torch.float32, 3, 7, MOST_TOKENS)):
        yield _product_case(dtype, n, m, tokens)
    own, tiles = "*bf16:16", config(4096, 2048, 1, 132)
    pointers = {"x": own, "values": own, "codes": "*i32:16", "bias": own, "y": own}
    numbers = dict.fromkeys(("columns", "rows", "x_stride", "stored"), "i32:16") | {"tokens": "i32"}
    yield CompileCase(multiply_fours, {**pointers, **numbers}, _fours(torch.bfloat16, 3, WARPS[0]), WARPS[0], 1)
    pointers = {"values": own, "codes": "*i32:16", "weight": own}
    numbers = dict.fromkeys(("columns", "rows", "kept", "stored"), "i32:16")
    yield CompileCase(unpack, {**pointers, **numbers}, _constants(torch.bfloat16, 2, 4, tiles), tiles.warps, 1)


def _product_case(dtype: torch.dtype, n: int, m: int, tokens: int) -> CompileCase:
    tiles = config(4096, 2048, tokens, 132)
    own = f"*{DTYPES[dtype]}:16"
    numbers = dict.fromkeys(("columns", "rows", "kept", "stored"), "i32:16") | {"tokens": "i32"}
    return CompileCase(
        multiply,
        {"x": own, "values": own, "codes": "*i32:16", "bias": own, "y": own, **numbers},
        {**_constants(dtype, n, m, tiles), "TOKENS": tokens},
        tiles.warps,
        1,
    )
