"""Product shared by `gram_`, `cross_gram_`, `sensitivity_` and `add_product`: `out += alpha * x^T y`, over a long common index.

Floor, on an H200: `depth * features^2` operations for one triangle of a Gram matrix. bf16 [262144, 4096] needs 4.4 TFLOP, 5.6 ms at
790 TFLOP/s; the full product needs 11.1 ms. Tiles that cross the diagonal make it 272 of 512 tiles, 5.9 ms.

* Both operands are stored as the tensor cores read them. `x` is `[depth, rows]` with contiguous rows, and wgmma takes either 16-bit
  operand with its non-reduced index contiguous in shared memory. The bulk copy engine (or cp.async) therefore puts tiles of `x`
  directly where the tensor cores read them. No register, shuffle or transposition is involved.
* A tile of 128 x 256 accumulators fills the registers of two warpgroups. It reads 48 KB from the L2 cache for 4.2 MFLOP, 9 TB/s at full
  speed, so smaller tiles would be limited by the cache. Tiles are taken in bands, so that concurrent programs share their columns. All
  programs walk the depth together: `x` is read from memory about once per wave.
* Waves: every whole wave of tiles goes through the whole depth and adds to `out` directly. The remaining tiles are split along the depth
  to fill the device; their partial sums go to a workspace, which a second kernel adds in a fixed order. Without atomics, every run gives
  the same bits.
* Products of 16-bit inputs are exact. Tensor cores truncate when they accumulate, which biases a long sum of squares by about
  depth / 16 * 2e-8 of the result. A sum is therefore added to `out`, where additions round, after a depth of `CHAIN`: 9e-5 at most.
* float32 is multiplied as three products of TF32 pieces ("tf32x3"), with the error of float32: at most 131 TFLOP/s.
* With a weight the product is `out += |weight| * (|x|^T y)`. The absolute value of `x` is taken in registers, from which wgmma reads its
  first operand (`ldmatrix` and 16 `and`s per step, hidden behind the previous product). The second operand must be in shared memory;
  changing it there would stall the tensor cores. The caller therefore makes `y` non-negative in a pass of its own.
* Masked rows of `x` and `y` are loaded as zeros, so that their contents do not matter. cp.async can do that, the copy engine cannot.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import (
    GROUP,
    SLICE,
    STRIP,
    CompileCase,
    add_partials,
    add_tile,
    aligned_rows,
    aligned_width,
    case_of_partials,
    check_operand,
    device_of,
    lower_tiles,
    on_device_of,
    place_of_tile,
    takes_descriptor,
    weighed_pointers,
)

CHAIN = 65536  # depth summed by one accumulator
# Costs of a split in steps of the inner loop, 0.6 us each: filling the pipeline and writing the tile; launching the second kernel;
# reading one more tile in that kernel.
START, SECOND, READ = 10, 5, 0.05
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Config(NamedTuple):
    """The shape of a tile and how it is computed.

    Attributes:
        rows: rows of a tile of the result.
        columns: columns of a tile of the result.
        depth: depth of a step.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        descriptors: whether the bulk copy engine may load the tiles.
        precision: `input_precision` of `tl.dot`.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    descriptors: bool
    precision: str


class Weighed(NamedTuple):
    """The factor of a weighted product `out += |weight| * (|x|^T y)`.

    Attributes:
        weight: `[rows, columns]`.
        status: two int32, or None. If the first is set, the product does nothing; the second is set if a sum is not finite.
    """

    weight: torch.Tensor
    status: torch.Tensor | None


class Part(NamedTuple):
    """Tiles `[first_tile, first_tile + tiles)` over the depth `[begin, end)`, in `splits` of `depth` each.

    Attributes:
        first_tile: index of the first tile.
        tiles: number of tiles.
        begin: first index of the depth.
        end: end of the depth, exclusive.
        splits: number of splits of the depth.
        depth: depth of a split.
    """

    first_tile: int
    tiles: int
    begin: int
    end: int
    splits: int
    depth: int


def config(dtype: torch.dtype, columns: int, capability: tuple[int, int]) -> Config:
    """Return the tile sizes for inputs of `dtype` and a result of `columns` columns."""
    large = capability[0] in (9, 10)  # 227 KB of shared memory and the bulk copy engine; other devices have at least 99 KB
    if dtype == torch.float32:
        return Config(128, 128, 32 if large else 16, 8, 3, large, "tf32x3")
    return Config(128, 256 if columns > 128 else 128, 64 if large else 32, 8, 4, large, "ieee")


@functools.lru_cache(maxsize=1024)
def schedule(tiles: int, depth: int, step: int, multiprocessors: int) -> tuple[Part, ...]:
    """Return parts that cover all tiles and the whole depth.

    Args:
        tiles: number of tiles of the result.
        depth: length of the common index.
        step: depth that a program takes at a time.
        multiprocessors: of the device; each runs one program.
    """
    if not tiles or not depth:
        return ()
    parts = []
    rest = tiles % multiprocessors
    if tiles > rest:
        chains = [(begin, min(begin + CHAIN, depth)) for begin in range(0, depth, CHAIN)]
        parts += [Part(0, tiles - rest, begin, end, 1, end - begin) for begin, end in chains]
    if rest:
        each = _depth_of_a_split(rest, depth, step, multiprocessors)
        parts.append(Part(tiles - rest, rest, 0, depth, triton.cdiv(depth, each), each))
    return tuple(parts)


def _depth_of_a_split(tiles: int, depth: int, step: int, multiprocessors: int) -> int:
    """Return the depth of a split, a multiple of `step`, that finishes `tiles` soonest.

    The workspace is limited to eight waves of tiles.
    """
    steps = triton.cdiv(depth, step)
    least = triton.cdiv(depth, CHAIN)
    most = max(least, min(steps, 8 * multiprocessors // tiles))

    def cost(splits: int) -> float:
        units = tiles * splits
        second = SECOND + READ * units if splits > 1 else 0
        return triton.cdiv(units, multiprocessors) * (triton.cdiv(steps, splits) + START) + second

    return triton.cdiv(steps, min(range(least, most + 1), key=cost)) * step


@triton.jit(do_not_specialize=["first_tile", "begin", "end"])
def product(
    x, y, row_mask, out, weight, status, partials, x_width, y_width, rows, columns, x_stride, y_stride, out_stride, weight_stride,
    first_tile, begin, end, split_depth, alpha,
    LOWER: tl.constexpr, TURNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of `x^T y` over one split of the depth and add it to `out`, or store it in `partials` if given.

    `x` and `y` point to rows of `x_width` and `y_width`, of which only the first `rows` and `columns` are used. With `DESCRIPTORS` they
    are tensor descriptors of tiles `[DEPTH, ROWS]` and `[DEPTH, COLUMNS]`. With `TURNED`, `x` is stored as `[rows, depth]`. `weight`
    and `status` are those of `Weighed`.
    """
    if status is not None:
        if tl.load(status) != 0:
            return
    index, split = tl.program_id(0), tl.program_id(1)
    row, column = place_of_tile(first_tile + index, rows, columns, LOWER, ROWS, COLUMNS, GROUP)
    begin = tl.multiple_of(begin + split * split_depth, DEPTH)
    stop = min(begin + split_depth, end)
    tl.assume(begin < stop)  # without it a path around the loop sets the accumulators, and ptxas waits for every product

    accumulators = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(begin, stop, DEPTH):  # the copy engine pads with zeros past the end of a tensor
            a = x.load([row, k] if TURNED else [k, row])
            b = y.load([k, column])
            if weight is not None:
                a = tl.abs(a)
            a = a if TURNED else a.T
            accumulators = tl.dot(a, b, accumulators, input_precision=PRECISION)
    else:
        lane = tl.arange(0, DEPTH)
        a_row = row + tl.arange(0, ROWS)
        b_column = column + tl.arange(0, COLUMNS)
        first = (begin + lane).to(tl.int64)
        step = tl.full((), DEPTH, tl.int64)
        if TURNED:
            a_place = x + a_row.to(tl.int64)[:, None] * x_stride + first[None, :]
            a_step = step
        else:
            a_place = x + first[None, :] * x_stride + a_row[:, None]
            a_step = step * x_stride
        b_place = y + first[:, None] * y_stride + b_column[None, :]
        for k in range(begin, stop, DEPTH):
            used = k + lane < end
            if row_mask is not None:
                used &= tl.load(row_mask + k + lane, mask=used, other=0) != 0
            if TURNED:
                a = tl.load(a_place, mask=(k + lane < x_width)[None, :] & (a_row < rows)[:, None], other=0.0)
            else:
                a = tl.load(a_place, mask=used[None, :] & (a_row < x_width)[:, None], other=0.0)
            b = tl.load(b_place, mask=used[:, None] & (b_column < y_width)[None, :], other=0.0)
            if weight is not None:
                a = tl.abs(a)
            accumulators = tl.dot(a, b, accumulators, input_precision=PRECISION)
            a_place += a_step
            b_place += step * y_stride

    if partials is None:
        add_tile(
            out, weight, status, accumulators, row, column, rows, columns, out_stride, weight_stride, alpha,
            LOWER, ROWS, COLUMNS, SLICE,
        )  # fmt: skip
    else:
        place = partials + (split * tl.num_programs(0) + index).to(tl.int64) * (ROWS * COLUMNS)
        tl.store(place + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], accumulators)


def add_product_over_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    row_mask: torch.Tensor | None = None,
    alpha: float = 1.0,
    lower: bool = False,
    turned: bool = False,
    weighed: Weighed | None = None,
    names: tuple[str, str, str] = ("out", "x", "y"),
) -> None:
    """Add `alpha * x^T y` to `out`, over the rows of `x` and `y` that `row_mask` keeps.

    Args:
        out: `[rows, columns]` float32, updated in place.
        x: `[depth, rows]`, bfloat16, float16 or float32.
        y: `[depth, columns]` in the dtype of `x`.
        row_mask: `[depth]` bool; None keeps all rows.
        alpha: scale of the product.
        lower: update only the lower triangle of a square `out`. Entries above the diagonal stay unchanged.
        turned: `x` is given as `[rows, depth]`.
        weighed: multiply absolute values and weights, see `Weighed`.
        names: names of `out`, `x` and `y` in errors.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    (rows, columns), depth = out.shape, y.shape[0]
    check_operand(names[1], x, y, (rows, depth) if turned else (depth, rows), DTYPES)
    check_operand(names[2], y, x, (depth, columns), (x.dtype,))
    check_operand(names[0], out, x, (rows, columns))
    if row_mask is not None:
        check_operand("row_mask", row_mask, x, (depth,), (torch.bool,))
        row_mask = row_mask.contiguous()
    if weighed is not None:
        check_operand("weight", weighed.weight, x, (rows, columns), (x.dtype,))
        weighed = weighed._replace(weight=_rows_together(weighed.weight))
    dense = _rows_together(out)
    with on_device_of(x):
        _launch(dense, x, y, row_mask, alpha, lower, turned, weighed)
    if dense is not out:
        out.copy_(dense)


def _rows_together(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    row_mask: torch.Tensor | None,
    alpha: float,
    lower: bool,
    turned: bool,
    weighed: Weighed | None,
) -> None:
    (rows, columns), depth, device = out.shape, y.shape[0], device_of(x)
    tile = config(x.dtype, columns, device.capability)
    parts = schedule(_tiles(rows, columns, tile, lower), depth, tile.depth, device.multiprocessors)
    if not parts:
        return
    descriptors = tile.descriptors and row_mask is None and takes_descriptor(x) and takes_descriptor(y)
    if descriptors:
        a = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth] if turned else [tile.depth, tile.rows])
        b = TensorDescriptor.from_tensor(y, [tile.depth, tile.columns])
    else:
        y_is_x, x = y is x, aligned_rows(x)
        y = x if y_is_x else aligned_rows(y)
        a, b = x, y
    widths = depth if turned else aligned_width(rows), aligned_width(columns)
    shape = _shape(tile, lower)
    weight, status = weighed or (None, None)
    weight_stride = 0 if weight is None else weight.stride(0)
    for part in parts:
        partials = None
        if part.splits > 1:
            partials = x.new_empty((part.splits, part.tiles, tile.rows, tile.columns), dtype=torch.float32)
        product[(part.tiles, part.splits)](
            a, b, row_mask, out, weight, status, partials,
            *widths, rows, columns, x.stride(0), y.stride(0), out.stride(0), weight_stride,
            part.first_tile, part.begin, part.end, part.depth, alpha,
            **shape, **_loop(tile, turned, descriptors), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if partials is not None:
            add_partials[(part.tiles, tile.rows // STRIP)](
                out, weight, status, partials, rows, columns, out.stride(0), weight_stride, part.first_tile, part.splits, alpha,
                **shape, STRIP=STRIP,
            )  # fmt: skip


def _tiles(rows: int, columns: int, tile: Config, lower: bool) -> int:
    row_tiles = triton.cdiv(rows, tile.rows)
    return lower_tiles(row_tiles, tile.columns // tile.rows) if lower else row_tiles * triton.cdiv(columns, tile.columns)


def _shape(tile: Config, lower: bool) -> dict[str, object]:
    return {"LOWER": lower, "ROWS": tile.rows, "COLUMNS": tile.columns, "GROUP": GROUP}


def _loop(tile: Config, turned: bool, descriptors: bool) -> dict[str, object]:
    return {"TURNED": turned, "DESCRIPTORS": descriptors, "PRECISION": tile.precision, "DEPTH": tile.depth, "SLICE": SLICE}


def compile_cases(
    capability: tuple[int, int],
    dtypes: Sequence[torch.dtype] = tuple(DTYPES),
    *,
    masks: bool = True,
    lower: bool = False,
    turned: bool = False,
) -> Iterator[CompileCase]:
    """Yield the most demanding shipped configurations for devices of `capability`.

    Loops without descriptors are compiled with a row mask, which needs more registers. Narrow tiles of float16 equal those of bfloat16.
    """
    wide = {(dtype, config(dtype, 4096, capability)) for dtype in dtypes}
    tiles = wide | {(dtype, config(dtype, 128, capability)) for dtype in dtypes if dtype != torch.float16}
    for dtype, tile in sorted(tiles, key=repr):
        for split, (descriptors, masked) in itertools.product((False, True), [(False, masks), (tile.descriptors, False)]):
            yield _case(tile, DTYPES[dtype], lower, turned, descriptors, masked, split)
    yield from (case_of_partials(_shape(tile, lower)) for tile in sorted({tile for _, tile in tiles}))


def weighed_compile_cases(capability: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> Iterator[CompileCase]:
    """Yield the most demanding shipped configurations with a weight.

    Narrow tiles need fewer registers, and tiles of a split depth do less after the loop.
    """
    for dtype in dtypes:
        tile, name = config(dtype, 4096, capability), DTYPES[dtype]
        for descriptors in sorted({False, tile.descriptors}):
            yield _case(tile, name, False, False, descriptors, not descriptors, False, weighed=True)
        yield case_of_partials(_shape(tile, False), name)


def _case(
    tile: Config, dtype: str, lower: bool, turned: bool, descriptors: bool, masked: bool, split: bool, weighed: bool = False
) -> CompileCase:
    operands = {"x": f"*{dtype}:16", "y": f"*{dtype}:16"}
    if descriptors:
        x_block = (tile.rows, tile.depth) if turned else (tile.depth, tile.rows)
        blocks = {"x": x_block, "y": (tile.depth, tile.columns)}
        operands = {name: f"tensordesc<{dtype}[{height}, {width}]>" for name, (height, width) in blocks.items()}
    multiples = ("x_width", "y_width", "rows", "columns", "x_stride", "y_stride", "out_stride", "weight_stride", "split_depth")
    numbers = dict.fromkeys(multiples, "i32:16")
    numbers |= dict.fromkeys(("first_tile", "begin", "end"), "i32")
    optional = {"row_mask": "*i1:16" if masked else None, "partials": "*fp32:16" if split else None}
    pointers, absent = weighed_pointers(dtype if weighed else None)
    pointers |= {name: kind for name, kind in optional.items() if kind}
    absent |= {name: None for name, kind in optional.items() if not kind}
    return CompileCase(
        product,
        {**operands, **pointers, "out": "*fp32:16", **numbers, "alpha": "fp32"},
        {**absent, **_shape(tile, lower), **_loop(tile, turned, descriptors)},
        tile.num_warps,
        tile.num_stages,
        tensor_cores=True,
    )
