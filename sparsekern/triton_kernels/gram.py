"""`gram_` in Triton, and the product over tokens that `cross_gram_` shares with it.

Floor, on an H200: `tokens * features^2` operations for one triangle. bf16 [262144, 4096] is 4.4 TFLOP, 5.6 ms at 790 TFLOP/s, against
11.1 ms for the full product; with what sticks out over the diagonal 272 of 512 tiles, 5.9 ms.

* Both operands lie as the tensor cores want them: `x` is `[tokens, features]`, features contiguous, and wgmma takes either operand
  of 16 bits with its non-reduced index contiguous in shared memory. So the bulk copy engine (or cp.async) puts tiles of `x` where
  the tensor cores read them, and no register, shuffle or transposition is in between.
* A tile of 128 x 256 accumulators fills the registers of two warpgroups. It asks 48 KB of the L2 cache for 4.2 MFLOP, which at full
  speed is already 9 TB/s; nothing smaller would do. Tiles are worked through in bands, so that programs that run at a time share
  their columns, and all run through the tokens together: `x` comes out of memory about once a wave.
* Waves: as many whole waves of tiles as there are go over all tokens and add to `gram` themselves. The tiles left over are split
  along the tokens to fill the machine, into a workspace that a second kernel sums in a fixed order. No atomics: the same bits on
  every run.
* Products of 16-bit inputs are exact. Tensor cores truncate when they accumulate, which over a long sum of squares is a bias: about
  tokens / 16 * 2e-8 of the result. A sum is therefore carried to `gram`, where additions round, after `CHAIN` tokens: 9e-5 at most.
* float32 is multiplied as three products of TF32 pieces ("tf32x3"), whose error is that of float32; a third of the TF32 speed.
* Masked rows are loaded as zeros, so that what is in them does not matter. The copy engine cannot do that, cp.async can.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
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
    case_of_partials,
    check_operand,
    device_of,
    lower_tile_at,
    lower_tiles,
    on_device_of,
    takes_descriptor,
    tile_at,
)

CHAIN = 65536  # tokens that one accumulator takes in
# What a split costs, in steps of the inner loop of 0.6 us: to fill the pipeline and write the tile; to launch the second kernel;
# and for that kernel to read one tile more.
START, SECOND, READ = 10, 5, 0.05
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Config(NamedTuple):
    """One tile of the result, `rows` x `columns`, and the `tokens` of a step."""

    rows: int
    columns: int
    tokens: int
    num_warps: int
    num_stages: int
    descriptors: bool  # whether the bulk copy engine may load the tiles
    precision: str


class Part(NamedTuple):
    """Tiles `[first_tile, first_tile + tiles)` over tokens `[first_token, last_token)`, in `splits` of `tokens` each."""

    first_tile: int
    tiles: int
    first_token: int
    last_token: int
    splits: int
    tokens: int


def config(dtype: torch.dtype, columns: int, capability: tuple[int, int]) -> Config:
    """Tile sizes for inputs of `dtype` and a result of that many columns."""
    large = capability[0] in (9, 10)  # 227 KB of shared memory and the bulk copy engine; the others have 99 KB at least
    if dtype == torch.float32:
        return Config(128, 128, 32 if large else 16, 8, 3, large, "tf32x3")
    return Config(128, 256 if columns > 128 else 128, 64 if large else 32, 8, 4, large, "ieee")


@functools.lru_cache(maxsize=256)
def schedule(tiles: int, tokens: int, step: int, multiprocessors: int) -> tuple[Part, ...]:
    """The parts that cover all tiles and tokens, for programs that go `step` tokens at a time, one a multiprocessor."""
    if not tiles or not tokens:
        return ()
    parts = []
    rest = tiles % multiprocessors
    if tiles > rest:
        chains = [(first, min(first + CHAIN, tokens)) for first in range(0, tokens, CHAIN)]
        parts += [Part(0, tiles - rest, first, last, 1, last - first) for first, last in chains]
    if rest:
        each = _tokens_of_a_split(rest, tokens, step, multiprocessors)
        parts.append(Part(tiles - rest, rest, 0, tokens, triton.cdiv(tokens, each), each))
    return tuple(parts)


def _tokens_of_a_split(tiles: int, tokens: int, step: int, multiprocessors: int) -> int:
    """Those that finish `tiles` soonest, a multiple of `step`, in a workspace of eight waves of tiles at most."""
    steps = triton.cdiv(tokens, step)
    least = triton.cdiv(tokens, CHAIN)
    most = max(least, min(steps, 8 * multiprocessors // tiles))

    def cost(splits: int) -> float:
        units = tiles * splits
        second = SECOND + READ * units if splits > 1 else 0
        return triton.cdiv(units, multiprocessors) * (triton.cdiv(steps, splits) + START) + second

    return triton.cdiv(steps, min(range(least, most + 1), key=cost)) * step


@triton.jit(do_not_specialize=["first_tile", "first_token", "last_token"])
def product_over_tokens(
    x, y, row_mask, out, partials, rows, columns, x_stride, y_stride, out_stride,
    first_tile, first_token, last_token, split_tokens, alpha,
    LOWER: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One tile of `x^T y` over one split of the tokens: added to `out`, or where `partials` is given, written there.

    `x` and `y` are pointers, or with `DESCRIPTORS` tensor descriptors of tiles `[TOKENS, ROWS]` and `[TOKENS, COLUMNS]`.
    """
    index, split = tl.program_id(0), tl.program_id(1)
    if LOWER:
        i, j = lower_tile_at(first_tile + index, tl.cdiv(rows, ROWS), COLUMNS // ROWS, GROUP)
    else:
        i, j = tile_at(first_tile + index, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row, column = i * ROWS, j * COLUMNS
    begin = first_token + split * split_tokens
    end = min(begin + split_tokens, last_token)

    accumulators = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if DESCRIPTORS:
        for token in range(begin, end, TOKENS):  # past the last token the copy engine fills in zeros
            a = x.load([token, row])
            b = y.load([token, column])
            accumulators = tl.dot(a.T, b, accumulators, input_precision=PRECISION)
    else:
        lane = tl.arange(0, TOKENS)
        a_feature = row + tl.arange(0, ROWS)
        b_feature = column + tl.arange(0, COLUMNS)
        first = (begin + lane).to(tl.int64)
        a_place = x + first[None, :] * x_stride + a_feature[:, None]
        b_place = y + first[:, None] * y_stride + b_feature[None, :]
        step = tl.full((), TOKENS, tl.int64)
        for token in range(begin, end, TOKENS):
            used = token + lane < last_token
            if row_mask is not None:
                used &= tl.load(row_mask + token + lane, mask=used, other=0) != 0
            a = tl.load(a_place, mask=used[None, :] & (a_feature < rows)[:, None], other=0.0)
            b = tl.load(b_place, mask=used[:, None] & (b_feature < columns)[None, :], other=0.0)
            accumulators = tl.dot(a, b, accumulators, input_precision=PRECISION)
            a_place += step * x_stride
            b_place += step * y_stride

    if partials is None:
        add_tile(out, accumulators, row, column, rows, columns, out_stride, alpha, LOWER, ROWS, COLUMNS, SLICE)
    else:
        place = partials + (split * tl.num_programs(0) + index).to(tl.int64) * (ROWS * COLUMNS)
        tl.store(place + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], accumulators)


def gram_(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> None:
    """The op `gram_`; what is above the diagonal stays as it is."""
    features = gram.shape[0]
    check_operand("x", x, gram, (x.shape[0], features), NAMES)
    check_operand("gram", gram, x, (features, features))
    add_product_over_tokens(gram, x, x, row_mask, alpha, lower=True)


def add_product_over_tokens(
    out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, row_mask: torch.Tensor | None, alpha: float, *, lower: bool
) -> None:
    """`out += alpha * x^T y` over the rows that `row_mask` keeps; with `lower`, the lower triangle of a square `out`."""
    if row_mask is not None:
        check_operand("row_mask", row_mask, x, (x.shape[0],), (torch.bool,))
    x, y = (z if z.stride(1) == 1 else z.contiguous() for z in (x, y))
    dense = out if out.stride(1) == 1 else out.contiguous()
    with on_device_of(x):
        _add(dense, x, y, row_mask if row_mask is None else row_mask.contiguous(), alpha, lower)
    if dense is not out:
        out.copy_(dense)


def _add(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, row_mask: torch.Tensor | None, alpha: float, lower: bool) -> None:
    (tokens, rows), columns, device = x.shape, y.shape[1], device_of(x)
    tile = config(x.dtype, columns, device.capability)
    descriptors = tile.descriptors and row_mask is None and takes_descriptor(x) and takes_descriptor(y)
    a, b = x, y
    if descriptors:
        a = TensorDescriptor.from_tensor(x, [tile.tokens, tile.rows])
        b = TensorDescriptor.from_tensor(y, [tile.tokens, tile.columns])
    shape = _shape(tile, lower)
    for part in schedule(_tiles(rows, columns, tile, lower), tokens, tile.tokens, device.multiprocessors):
        partials = None
        if part.splits > 1:
            partials = x.new_empty((part.splits, part.tiles, tile.rows, tile.columns), dtype=torch.float32)
        product_over_tokens[(part.tiles, part.splits)](
            a, b, row_mask, out, partials, rows, columns, x.stride(0), y.stride(0), out.stride(0),
            part.first_tile, part.first_token, part.last_token, part.tokens, alpha,
            **shape, **_loop(tile, descriptors), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if partials is not None:
            add_partials[(part.tiles, tile.rows // STRIP)](
                out, partials, rows, columns, out.stride(0), part.first_tile, part.splits, alpha, **shape, STRIP=STRIP
            )


def _tiles(rows: int, columns: int, tile: Config, lower: bool) -> int:
    row_tiles = triton.cdiv(rows, tile.rows)
    return lower_tiles(row_tiles, tile.columns // tile.rows) if lower else row_tiles * triton.cdiv(columns, tile.columns)


def _shape(tile: Config, lower: bool) -> dict:
    return {"LOWER": lower, "ROWS": tile.rows, "COLUMNS": tile.columns, "GROUP": GROUP}


def _loop(tile: Config, descriptors: bool) -> dict:
    return {"DESCRIPTORS": descriptors, "PRECISION": tile.precision, "TOKENS": tile.tokens, "SLICE": SLICE}


def compile_cases(capability: tuple[int, int], *, lower: bool = True) -> Iterator[CompileCase]:
    """What is shipped for devices of that compute capability; with `lower=False`, for `cross_gram_`."""
    tiles = {(dtype, config(dtype, columns, capability)) for dtype in NAMES for columns in (128, 4096)}
    for dtype, tile in sorted(tiles, key=repr):
        for split, (descriptors, masked) in itertools.product((False, True), [(False, True), (tile.descriptors, False)]):
            yield _case(tile, NAMES[dtype], lower, descriptors, masked, split)
    yield from (case_of_partials(_shape(tile, lower)) for tile in sorted({tile for _, tile in tiles}))


def _case(tile: Config, dtype: str, lower: bool, descriptors: bool, masked: bool, split: bool) -> CompileCase:
    operands = {"x": f"*{dtype}:16", "y": f"*{dtype}:16"}
    if descriptors:
        blocks = {"x": (tile.tokens, tile.rows), "y": (tile.tokens, tile.columns)}
        operands = {name: f"tensordesc<{dtype}[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
    numbers = dict.fromkeys(("rows", "columns", "x_stride", "y_stride", "out_stride", "split_tokens"), "i32:16")
    numbers |= dict.fromkeys(("first_tile", "first_token", "last_token"), "i32")
    optional = {"row_mask": "*i1:16" if masked else None, "partials": "*fp32:16" if split else None}
    return CompileCase(
        product_over_tokens,
        {**operands, **{name: kind for name, kind in optional.items() if kind}, "out": "*fp32:16", **numbers, "alpha": "fp32"},
        {**{name: None for name, kind in optional.items() if not kind}, **_shape(tile, lower), **_loop(tile, descriptors)},
        tile.num_warps,
        tile.num_stages,
        tensor_cores=True,
    )
