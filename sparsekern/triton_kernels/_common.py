"""Helpers that several Triton kernels share: launch devices, tiles of a matrix, sums of split products."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ALIGNED = 16  # Triton loads 16 bytes at a time where it knows that sizes are multiples of this many elements
GROUP = 16  # tile rows per band: programs that run at the same time share columns in the L2 cache
STRIP = 16  # tile rows summed by one program of `add_partials`
SLICE = 32  # accumulator columns added to memory at a time: adding a whole tile would need its registers twice


class Device(NamedTuple):
    """The device properties that tile sizes depend on.

    Attributes:
        capability: compute capability, major and minor.
        multiprocessors: number of streaming multiprocessors.
    """

    capability: tuple[int, int]
    multiprocessors: int


class CompileCase(NamedTuple):
    """One shipped configuration of a kernel, for ahead-of-time compilation.

    Attributes:
        kernel: the `triton.jit` function.
        signature: type of each non-constant argument, such as `*bf16`, `i32` or `tensordesc<bf16[64, 128]>`. A suffix `:16` says
            that the pointer or number is a multiple of 16.
        constexprs: value of each constant.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        tensor_cores: whether the machine code must contain a tensor-core instruction.
    """

    kernel: triton.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False


def check_operand(
    name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype] = (torch.float32,)
) -> None:
    """Raise if `tensor` has another shape, dtype or device than its kernel assumes.

    Repeats the bounds checks of the op's wrapper, because a direct `torch.ops` call bypasses the wrapper.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != like.device:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name}: expected shape {shape} of {expected} on {like.device}, "
            f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels are launched on the tensor's device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> Device:
    """Return the device of `tensor`; for CPU tensors, which only the interpreter runs on, an H200."""
    return _device(tensor.device.index) if tensor.is_cuda else Device((9, 0), 132)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def takes_descriptor(x: torch.Tensor) -> bool:
    """Return whether the bulk copy engine can read the matrix `x` in place."""
    tokens, features = x.shape
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= features > 0 and 0 < tokens < 2**31 - 1024


def aligned_width(width: int) -> int:
    """Round `width` up to a multiple of `ALIGNED`."""
    return triton.cdiv(width, ALIGNED) * ALIGNED


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with rows that begin at 16-byte multiples and may be read up to `aligned_width`.

    Copies only if needed. Triton loads 16 bytes at a time where it knows that addresses and bounds are multiples of 16 elements;
    otherwise it loads single elements.
    """
    tokens, features = x.shape
    width = aligned_width(features)
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % ALIGNED == 0 and features == width:
        return x
    padded = x.new_empty((tokens, width))[:, :features]  # padding is multiplied but never stored
    return padded.copy_(x)


@triton.jit
def tile_at(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return row and column of the `index`-th tile of a matrix.

    Tiles are taken in bands of `GROUP` tile rows, column by column within a band.
    """
    band = index // (GROUP * column_tiles)
    height = min(GROUP, row_tiles - band * GROUP)
    inside = index - band * GROUP * column_tiles
    return band * GROUP + inside % height, inside // height


@triton.jit
def lower_tile_at(index, row_tiles, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Return row and column of the `index`-th tile that touches the lower triangle.

    A tile is `WIDE` times as wide as high. A band is a rectangle followed, at its right end, by a triangle.
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
    """Return the first row and column of the `index`-th tile of a matrix, or of its lower triangle."""
    if LOWER:
        row, column = lower_tile_at(index, tl.cdiv(rows, ROWS), COLUMNS // ROWS, GROUP)
    else:
        row, column = tile_at(index, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    return row * ROWS, column * COLUMNS


def lower_tiles(row_tiles: int, wide: int) -> int:
    """Return the number of tiles that `lower_tile_at` enumerates."""
    whole, rest = divmod(row_tiles, wide)
    return wide * whole * (whole + 1) // 2 + rest * (whole + 1)


@triton.jit
def add_tile(
    out, weight, status, tile, row, column, rows, columns, stride, weight_stride, alpha,
    LOWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Add `alpha * tile` to `out[row:, column:]`, with `LOWER` only on and below the diagonal.

    Adds a slice at a time to save registers. With `weight`, each element is multiplied by the absolute value of its weight. With
    `status`, sets `status[1]` if an element of `tile` is not finite.
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
    """Add `alpha * partials.sum(0)` to `out`, summing in order; `partials` is `[splits, tiles, ROWS, COLUMNS]`.

    A program handles `STRIP` rows of a tile. Floor: the bytes of `partials`. `weight` and `status` are those of `_product.Weighed`.
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
    """Return the compile case of `add_partials`.

    Args:
        shape: tile constants of the kernel that writes the partials.
        weight: Triton type of the weight; None compiles the kernel without one.
    """
    numbers = dict.fromkeys(("rows", "columns", "stride", "weight_stride"), "i32:16")
    numbers |= {"first_tile": "i32", "splits": "i32", "alpha": "fp32"}
    pointers, absent = weighed_pointers(weight)
    signature = {"out": "*fp32:16", "partials": "*fp32:16", **pointers, **numbers}
    return CompileCase(add_partials, signature, {**absent, **shape, "STRIP": STRIP}, 4, 3)


def weighed_pointers(weight: str | None) -> tuple[dict[str, str], dict[str, None]]:
    """Return the types of `weight` and `status` for a compile case, and the constants that replace them if absent."""
    return ({"weight": f"*{weight}:16", "status": "*i32:16"}, {}) if weight else ({}, {"weight": None, "status": None})
