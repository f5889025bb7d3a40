"""`bitmask_linear` in Triton: up to 16 tokens times the packed weight; for more tokens the weight is unpacked first.

Floor, on an H200: the packed bytes at 4.8 TB/s, `rows * columns * (2 d + 1/8)` for 16-bit values with a share d of non-zeros.
[4096, 4096] at d = 1/2 takes 3.9 us, the dense weight 7.0 us. That leaves 6.9 instructions per weight, zeros included, or 12.3 in the
time of the dense weight. Instructions therefore bound this kernel. For compute capability 9.0 ptxas emits 10.6 per weight for one token
of bfloat16, and 16 for 2 to 16 tokens.

* The position of a value is the number of bits before it. A program has a tile of 16 rows. It first counts the bits of all their words
  and stores the sums in a workspace, 1/32 of the bytes of a dense 16-bit weight. Words are then expanded independently.
* A thread expands 4 neighbouring columns of all 16 rows. One population count finds the value of the first bit. The next 4 slots are
  always read, so that they share an address. The threads of a warp read neighbouring slots; the two rows of a group share slots.
* The factors of a column are loaded once for 16 rows. One token is multiplied directly. More tokens use the tensor cores: each warp sums
  its own columns, and the sums of the warps are added at the end in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layouts.packed_rows import SLACK, TILE_ROWS, lanes, words
from ._common import CompileCase, check_operand, device_of, on_device_of
from ._packed_linear import COLUMNS, DTYPES, MOST_TOKENS, add_products, as_bias, as_matrix, side_by_side, store_product, warps_for

WORDS = 64  # words of a row counted at a time


class Weight(NamedTuple):
    """The packed tensors, contiguous, in the layout of `sparsekern.layouts.packed_rows`.

    Attributes:
        values: non-zeros in slots, in the dtype of the weight.
        bitmask: `[rows, words]` int64, one bit a column.
        starts: first slot of each tile, int64.
        order: row of the output for each packed row, int32.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor


def weight_of(values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor) -> Weight:
    """Return the packed tensors contiguous, and with values that begin with a whole slot."""
    values = values.contiguous()
    values = values if values.data_ptr() % 4 == 0 else values.clone()
    return Weight(values, bitmask.contiguous(), starts.contiguous(), order.contiguous())


def config(rows: int, columns: int, tokens: int, multiprocessors: int) -> int:
    """Return the warps per program. A multiprocessor has registers for 16 warps with one token, and for 8 to 12 with more."""
    return warps_for(triton.cdiv(rows, TILE_ROWS), columns, (8, 8, 4) if tokens == 1 else (8, 4), multiprocessors)


@triton.jit
def count_bits(bits):
    """Count the bits of each uint64, in a form that LLVM compiles to the population count instruction."""
    bits -= (bits >> 1) & 0x5555555555555555
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56).to(tl.int32)


@triton.jit
def find_tile(
    values, bits, starts, order, ends, status, tile, rows, words, slots,
    LANES: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return the first row of a tile, and pointers to its values, bits and ends.

    Writes `ends`: the end of each word's values, in slots from the first slot of the tile. Every stored end stays inside the values,
    whatever the tensors hold. Sets `status` if the tensors contradict each other.
    """
    first = tile.to(tl.int64) * ROWS
    row, lane = tl.arange(0, ROWS), tl.arange(0, WORDS)
    in_rows = first + row < rows
    place = (first + row)[:, None] * words + lane[None, :]
    ones = tl.zeros([ROWS], tl.int32)
    for word in range(0, words, WORDS):
        inside = in_rows[:, None] & (word + lane < words)[None, :]
        ones += tl.sum(count_bits(tl.load(bits + place + word, mask=inside, other=0).to(tl.uint64, bitcast=True)), axis=1)
    longest = tl.max(ones.reshape(ROWS // LANES, LANES), axis=1)
    group = tl.cumsum(longest, axis=0) - longest
    before = tl.broadcast_to(group[:, None], ROWS // LANES, LANES).reshape(ROWS)

    start = tl.load(starts + tile)
    if status is not None:
        end = tl.load(starts + tile + 1)
        target = tl.load(order + first + row, mask=in_rows, other=0)
        astray = tl.max(((target < 0) | (target >= rows)).to(tl.int32), axis=0) > 0
        wrong = (start < 0) | (start > end) | (end > slots) | (start + tl.sum(longest, axis=0) > slots) | astray
        tl.store(status, 1, mask=wrong)
    start = tl.minimum(tl.maximum(start, 0), slots)
    room = tl.minimum(slots - start, 2**30).to(tl.int32)
    for word in range(0, words, WORDS):
        inside = in_rows[:, None] & (word + lane < words)[None, :]
        counts = count_bits(tl.load(bits + place + word, mask=inside, other=0).to(tl.uint64, bitcast=True))
        own = tl.minimum(before[:, None] + tl.cumsum(counts, axis=1) - counts, room)
        tl.store(ends + place + word, own + counts, mask=inside)
        before += tl.sum(counts, axis=1)
    tl.debug_barrier()  # other threads read `ends`
    return first, values + start * LANES, bits + first * words, ends + first * words


@triton.jit
def value_in(slot, here, row, VALUE: tl.constexpr, WANTED: tl.constexpr):
    """Return the value of `row` in a slot, converted to `WANTED`; zero where `here` is false. Two rows of 16-bit values share a slot."""
    shift = (row % 2 * 16).to(tl.uint32)
    if VALUE == tl.float32:
        value = slot.to(tl.float32, bitcast=True)
    elif VALUE == tl.bfloat16 and WANTED == tl.float32:  # bfloat16 is the upper half of float32
        value = (slot >> shift << 16).to(tl.float32, bitcast=True)
    else:
        value = (slot >> shift).to(tl.uint16).to(VALUE, bitcast=True).to(WANTED)
    return tl.where(here, value, 0.0)


@triton.jit
def expand(values, bits, ends, column, row, inside, words, WANTED: tl.constexpr):
    """Return the weights of `column` and the 3 columns after it, zeros included.

    Always reads the next 4 slots, which share an address; each set bit advances to the next slot.
    """
    word = row * words + column // 64
    ones = tl.load(bits + word, mask=inside, other=0).to(tl.uint64, bitcast=True) >> (column % 64).to(tl.uint64)
    slots = values.to(tl.pointer_type(tl.uint32)) + (tl.load(ends + word, mask=inside, other=0) - count_bits(ones))
    slot, second, third, fourth = tl.load(slots), tl.load(slots + 1), tl.load(slots + 2), tl.load(slots + 3)
    four = ones.to(tl.int32)
    VALUE: tl.constexpr = values.dtype.element_ty
    here = (four & 1) != 0
    a = value_in(slot, here, row, VALUE, WANTED)
    slot, second, third = tl.where(here, second, slot), tl.where(here, third, second), tl.where(here, fourth, third)
    here = (four & 2) != 0
    b = value_in(slot, here, row, VALUE, WANTED)
    slot, second = tl.where(here, second, slot), tl.where(here, third, second)
    here = (four & 4) != 0
    c = value_in(slot, here, row, VALUE, WANTED)
    d = value_in(tl.where(here, second, slot), (four & 8) != 0, row, VALUE, WANTED)
    return a, b, c, d


@triton.jit
def multiply_tile(
    x, values, bits, ends, first, columns, rows, words, x_row, present,
    TOKENS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the products of a tile that `find_tile` found with the tokens, `[ROWS, TOKENS]`.

    One token is the row that `x` points at. More tokens are a tile of the tensor cores, with `x_row` and `present` of `add_products`.
    """
    row, piece = tl.arange(0, ROWS)[:, None, None], tl.arange(0, PIECES)[None, :, None]
    four = 4 * tl.arange(0, COLUMNS // 4)[None, None, :]
    left = (rows - first).to(tl.int32)
    if TOKENS == 1:
        sums = tl.zeros([ROWS, PIECES, COLUMNS // 4], tl.float32)
    else:
        sums = tl.zeros([PIECES, ROWS, TOKENS], tl.float32)
    for step in range(0, tl.cdiv(columns, PIECES * COLUMNS)):
        column = (step * PIECES + piece) * COLUMNS
        inside = (column + four < columns) & (row < left)
        if TOKENS == 1:
            weights = expand(values, bits, ends, column + four, row, inside, words, tl.float32)
            for i in tl.static_range(4):
                factor = tl.load(x + column + four + i, mask=column + four + i < columns, other=0.0)
                sums += weights[i] * factor.to(tl.float32)
        else:
            a, b, c, d = expand(values, bits, ends, column + four, row, inside, words, values.dtype.element_ty)
            weight = side_by_side(a, b, c, d, ROWS, PIECES, COLUMNS)
            sums = add_products(sums, weight, x, column, columns, x_row, present, TOKENS)
    if TOKENS == 1:
        sums = tl.sum(sums, axis=2)[:, :, None].permute(1, 0, 2)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["tokens", "slots"])
def multiply(
    x, values, bits, starts, order, ends, status, bias, y, tokens, columns, rows, x_stride, words, slots,
    TOKENS: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows by all tokens, at most `TOKENS`: one, or a tile of the tensor cores."""
    first, values, bits, ends = find_tile(
        values, bits, starts, order, ends, status, tl.program_id(0), rows, words, slots, LANES, ROWS, WORDS
    )
    token = tl.arange(0, TOKENS)
    present = token < tokens
    sums = multiply_tile(
        x, values, bits, ends, first, columns, rows, words, token.to(tl.int64) * x_stride, present, TOKENS, PIECES, ROWS, COLUMNS
    )
    store_product(sums, y, bias, order, first, rows, token.to(tl.int64) * rows, present, ROWS)


@triton.jit(do_not_specialize=["slots"])
def unpack(
    values, bits, starts, order, ends, status, weight, columns, rows, words, slots,
    PIECES: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write a tile of rows to the dense weight."""
    first, values, bits, ends = find_tile(
        values, bits, starts, order, ends, status, tl.program_id(0), rows, words, slots, LANES, ROWS, WORDS
    )
    row, piece = tl.arange(0, ROWS)[:, None, None], tl.arange(0, PIECES)[None, :, None]
    four, lane = 4 * tl.arange(0, COLUMNS // 4)[None, None, :], tl.arange(0, COLUMNS)[None, None, :]
    in_rows = first + row < rows
    target = tl.load(order + first + row, mask=in_rows, other=0).to(tl.int64)
    in_weight = in_rows & (target >= 0) & (target < rows)
    for step in range(0, tl.cdiv(columns, PIECES * COLUMNS)):
        column = (step * PIECES + piece) * COLUMNS
        inside = in_rows & (column + four < columns)
        a, b, c, d = expand(values, bits, ends, column + four, row, inside, words, values.dtype.element_ty)
        column += lane
        dense = side_by_side(a, b, c, d, ROWS, PIECES, COLUMNS)
        tl.store(weight + target * columns + column, dense, mask=in_weight & (column < columns))


def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, status: torch.Tensor | None) -> torch.Tensor:
    """Return `x W^T + b`, `[..., rows]`, for up to `MOST_TOKENS` tokens.

    Args:
        x: `[..., columns]`, bfloat16, float16 or float32.
        weight: packed weight in the dtype of `x`.
        bias: `[rows]` in the dtype of `x`, or None.
        status: int32 scalar, set if the packed tensors contradict each other; None skips the check.

    Raises:
        ValueError: more tokens, or shapes, dtypes or devices that do not match.
    """
    rows = _check(weight, x)
    y = x.new_empty((*x.shape[:-1], rows))
    x, bias = as_matrix(x), as_bias(bias, (rows,), x)
    tokens, columns = x.shape
    if tokens > MOST_TOKENS:
        raise ValueError(f"x: expected at most {MOST_TOKENS} tokens, got {tokens}")
    if tokens and rows:
        warps = config(rows, columns, tokens, device_of(x).multiprocessors)
        with on_device_of(x):
            multiply[(triton.cdiv(rows, TILE_ROWS),)](
                x, *weight, _workspace(weight), status, bias, y, tokens, columns, rows, x.stride(0), words(columns), slots_of(weight),
                TOKENS=1 if tokens == 1 else MOST_TOKENS, **constants(weight.values.dtype, warps), num_warps=warps, num_stages=1,
            )  # fmt: skip
    return y


def unpacked(weight: Weight, columns: int, status: torch.Tensor | None) -> torch.Tensor:
    """Return the dense weight, `[rows, columns]`; `status` as in `product`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    rows = len(weight.order)
    dense = weight.values.new_empty((rows, columns))
    _check(weight, dense)
    if rows:
        warps = config(rows, columns, MOST_TOKENS, device_of(dense).multiprocessors)
        with on_device_of(dense):
            unpack[(triton.cdiv(rows, TILE_ROWS),)](
                *weight, _workspace(weight), status, dense, columns, rows, words(columns), slots_of(weight),
                **constants(dense.dtype, warps), num_warps=warps, num_stages=1,
            )  # fmt: skip
    return dense


def _workspace(weight: Weight) -> torch.Tensor:
    return weight.order.new_empty(weight.bitmask.shape)


def slots_of(weight: Weight) -> int:
    """Return the number of slots that hold values."""
    return len(weight.values) // lanes(weight.values.dtype) - SLACK


def _check(weight: Weight, x: torch.Tensor) -> int:
    """Return the number of rows; raise if a packed tensor is smaller than the kernels assume, whatever it holds."""
    rows, count = len(weight.order), len(weight.values)
    least = max(count - count % lanes(x.dtype), SLACK * lanes(x.dtype))
    check_operand("values", weight.values, x, (least,), (x.dtype,))
    check_operand("bitmask", weight.bitmask, x, (rows, words(x.shape[-1])), (torch.int64,))
    check_operand("starts", weight.starts, x, (triton.cdiv(rows, TILE_ROWS) + 1,), (torch.int64,))
    check_operand("order", weight.order, x, (rows,), (torch.int32,))
    return rows


def constants(dtype: torch.dtype, warps: int) -> dict[str, int]:
    """Return the constants that all kernels of bitmask rows have."""
    return {"PIECES": warps, "LANES": lanes(dtype), "ROWS": TILE_ROWS, "COLUMNS": COLUMNS, "WORDS": WORDS}


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the configurations that need the most registers, the same for every device."""
    for dtype, tokens, warps in (
        (torch.bfloat16, 1, 8),
        (torch.float16, 1, 8),
        (torch.bfloat16, MOST_TOKENS, 8),
        (torch.float32, MOST_TOKENS, 8),
    ):
        yield _product_case(dtype, tokens, warps)
    numbers = {"columns": "i32:16", "rows": "i32:16", "words": "i32:16", "slots": "i64"}
    pointers = {**packed_types(torch.bfloat16), "status": "*i32:16", "weight": "*bf16:16"}
    yield CompileCase(unpack, {**pointers, **numbers}, constants(torch.bfloat16, 8), 8, 1)


def packed_types(dtype: torch.dtype) -> dict[str, str]:
    """Return the types of the packed tensors and their ends, for a compile case."""
    return {"values": f"*{DTYPES[dtype]}:16", "bits": "*i64:16", "starts": "*i64:16", "order": "*i32:16", "ends": "*i32:16"}


def _product_case(dtype: torch.dtype, tokens: int, warps: int) -> CompileCase:
    """Return the compile case of a product with a bias and without checks, as in decoding."""
    own = f"*{DTYPES[dtype]}:16"
    numbers = dict.fromkeys(("columns", "rows", "x_stride", "words"), "i32:16") | {"tokens": "i32", "slots": "i64"}
    return CompileCase(
        multiply,
        {"x": own, **packed_types(dtype), "bias": own, "y": own, **numbers},
        {"status": None, "TOKENS": tokens, **constants(dtype, warps)},
        warps,
        1,
    )
