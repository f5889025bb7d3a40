"""What several Triton kernels share: the device a launch goes to, tiles of a matrix, and sums over split products."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ALIGNED = 16  # elements whose multiples Triton knows of
GROUP = 16  # tile rows that are worked through together, so that programs running at a time share columns in the L2 cache
STRIP = 16  # rows of a tile that one program of `add_partials` sums
SLICE = 32  # columns of an accumulator that are added to memory at a time: a whole tile would need its registers twice


class Device(NamedTuple):
    """What tile choices depend on."""

    capability: tuple[int, int]
    multiprocessors: int


class CompileCase(NamedTuple):
    """One shipped configuration of a kernel, for ahead-of-time compilation.

    Attributes:
        kernel: the `triton.jit` function.
        signature: the type of each argument that is no constant, as `*bf16`, `i32`, `tensordesc<bf16[64, 128]>`; `:16` behind it
            says that the pointer or number is a multiple of 16.
        constexprs: the constants.
        num_warps, num_stages: as at a launch.
        tensor_cores: whether a tensor-core instruction must be found in the machine code.
    """

    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False


def check_operand(
    name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype] = (torch.float32,)
) -> None:
    """What keeps a kernel inside its memory; the op's wrapper has checked the same and more, but it can be passed by."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != like.device:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name}: expected shape {shape} of {expected} on {like.device}, "
            f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def on_device_of(tensor: torch.Tensor):
    """Launches inside the `with` block go to the tensor's device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> Device:
    """The tensor's device; in the interpreter, where tensors are on the CPU, an H200."""
    return _device(tensor.device.index) if tensor.is_cuda else Device((9, 0), 132)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def takes_descriptor(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read the matrix `x` where it lies."""
    tokens, features = x.shape
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= features > 0 and 0 < tokens < 2**31 - 1024


def aligned_width(width: int) -> int:
    return triton.cdiv(width, ALIGNED) * ALIGNED


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with rows that begin at 16-byte multiples and may be read to their `aligned_width`, copied only where they do not.

    Triton loads 16 bytes at a time where it knows that addresses and bounds are multiples of 16 elements, and else one element.
    """
    tokens, features = x.shape
    width = aligned_width(features)
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % ALIGNED == 0 and features == width:
        return x
    padded = x.new_empty((tokens, width))[:, :features]  # what is beyond a row is multiplied, but never stored
    return padded.copy_(x)


@triton.jit
def tile_at(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of the `index`-th tile of a matrix, taken in bands of `GROUP` rows, down the columns of a band."""
    band = index // (GROUP * column_tiles)
    height = min(GROUP, row_tiles - band * GROUP)
    inside = index - band * GROUP * column_tiles
    return band * GROUP + inside % height, inside // height


@triton.jit
def lower_tile_at(index, row_tiles, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Likewise of the tiles that reach to or below the diagonal, where a tile is `WIDE` times as wide as high.

    A band is a rectangle and, at its right end, a triangle.
    """
    first = 0
    size = GROUP * (GROUP // WIDE + 1) // 2
    while index >= size:
        index -= size
        first += GROUP
        size += GROUP * (GROUP // WIDE)
    height = min(GROUP, row_tiles - first)
    rectangle = first // WIDE * height
    row = first + index % height
    column = index // height
    if index >= rectangle:
        index -= rectangle
        down = 0
        while index >= height - down:
            index -= height - down
            down += WIDE
        row = first + down + index
        column = (first + down) // WIDE
    return row, column


@triton.jit
def place_of_tile(index, rows, columns, LOWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of the `index`-th tile of a matrix, or of its lower triangle."""
    if LOWER:
        row, column = lower_tile_at(index, tl.cdiv(rows, ROWS), COLUMNS // ROWS, GROUP)
    else:
        row, column = tile_at(index, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    return row * ROWS, column * COLUMNS


def lower_tiles(row_tiles: int, wide: int) -> int:
    """How many tiles `lower_tile_at` goes through."""
    whole, rest = divmod(row_tiles, wide)
    return wide * whole * (whole + 1) // 2 + rest * (whole + 1)


@triton.jit
def add_tile(
    out, weight, status, tile, row, column, rows, columns, stride, weight_stride, alpha,
    LOWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """`out[row:, column:] += alpha * tile`, with `LOWER` only to and below the diagonal; by slices, to spare registers.

    With `weight` each element is multiplied by its absolute value; with `status`, `status[1]` is set if one of `tile` is not finite.
    """
    if COLUMNS > SLICE:
        left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        middle = column + COLUMNS // 2
        add_tile(
            out, weight, status, left, row, column, rows, columns, stride, weight_stride, alpha, LOWER, ROWS, COLUMNS // 2, SLICE
        )
        add_tile(
            out, weight, status, right, row, middle, rows, columns, stride, weight_stride, alpha, LOWER, ROWS, COLUMNS // 2, SLICE
        )
    else:
        i = row + tl.arange(0, ROWS)[:, None]
        j = column + tl.arange(0, COLUMNS)[None, :]
        inside = (i < rows) & (j < columns)
        if LOWER:
            inside &= j <= i
        if status is not None:
            finite = (tl.abs(tile) < float("inf")) | ~inside
            tl.store(status + 1, 1, mask=tl.min(finite.to(tl.int32)) == 0)
        scale = alpha
        if weight is not None:
            size = tl.abs(tl.load(weight + i.to(tl.int64) * weight_stride + j, mask=inside, other=0.0).to(tl.float32))
            scale = alpha * size
        place = out + i.to(tl.int64) * stride + j
        tl.store(place, tl.load(place, mask=inside) + scale * tile, mask=inside)


@triton.jit(do_not_specialize=["first_tile", "splits"])
def add_partials(
    out, weight, status, partials, rows, columns, stride, weight_stride, first_tile, splits, alpha,
    LOWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`out += alpha * partials.sum(0)`, summed in order; `partials` is `[splits, tiles, ROWS, COLUMNS]`.

    A program takes `STRIP` rows of a tile. Floor: the bytes of the partials. `weight` and `status` are those of `_product.Weighed`.
    """
    if status is not None:
        if tl.load(status) != 0:
            return
    index, tiles = tl.program_id(0), tl.num_programs(0)
    row, column = place_of_tile(first_tile + index, rows, columns, LOWER, ROWS, COLUMNS, GROUP)
    strip = tl.program_id(1) * STRIP
    inside = (strip + tl.arange(0, STRIP))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = partials + index.to(tl.int64) * (ROWS * COLUMNS) + inside
    total = tl.load(place)
    for _ in range(1, splits):
        place += tiles.to(tl.int64) * (ROWS * COLUMNS)
        total += tl.load(place)
    add_tile(
        out, weight, status, total, row + strip, column, rows, columns, stride, weight_stride, alpha,
        LOWER, STRIP, COLUMNS, COLUMNS,
    )  # fmt: skip


def case_of_partials(shape: dict[str, object], weight: str | None = None) -> CompileCase:
    """`add_partials` for tiles of that shape, the constants of a kernel that writes them; for a `weight` of that type, if any."""
    numbers = dict.fromkeys(("rows", "columns", "stride", "weight_stride"), "i32:16")
    numbers |= {"first_tile": "i32", "splits": "i32", "alpha": "fp32"}
    pointers, absent = weighed_pointers(weight)
    signature = {"out": "*fp32:16", "partials": "*fp32:16", **pointers, **numbers}
    return CompileCase(add_partials, signature, {**absent, **shape, "STRIP": STRIP}, 4, 3)


def weighed_pointers(weight: str | None) -> tuple[dict[str, str], dict[str, None]]:
    """Types of `weight` and `status` for a compile case, and the constants that stand for them where there are none."""
    return ({"weight": f"*{weight}:16", "status": "*i32:16"}, {}) if weight else ({}, {"weight": None, "status": None})
