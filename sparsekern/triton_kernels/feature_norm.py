"""`feature_norm_` in Triton: sums of squares, and of values, over the tokens of each feature.

Floor, on an H200: the bytes of `x` at 4.3 TB/s; bf16 [262144, 4096] takes 0.50 ms. That leaves 14 instructions an element. Four are spent
on a compensated sum of squares, four more on the plain sum, so that accuracy does not depend on the number of tokens. One widens a 16-bit
element. A warp reads 512 contiguous bytes of a token, 16 bytes per thread, and issues eight tokens before it needs the first.

The tokens are split over enough programs to fill the device. A second kernel adds their float64 sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, device_of, on_device_of

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOKENS, WARPS = 8, 4  # tokens of a step; warps of a program
UNROLL = 4  # steps whose loads are issued together
PROGRAMS = 8  # programs per multiprocessor
SPLITS, COLUMNS = 64, 32  # splits of a step of the second kernel, and columns of its program


class Partials(NamedTuple):
    """The sums of each split of the tokens.

    Attributes:
        sums: `[splits, 1 or 2, features]` float64.
        suspect: int32 scalar, set if a sum is not finite.
    """

    sums: torch.Tensor
    suspect: torch.Tensor


def block_columns(dtype: torch.dtype) -> int:
    """Return the number of columns of a program: 512 bytes."""
    return 512 // dtype.itemsize


def split_tokens(tokens: int, features: int, dtype: torch.dtype, multiprocessors: int) -> int:
    """Return the tokens per program: whole rounds of unrolled steps, with enough programs for every multiprocessor."""
    blocks = triton.cdiv(features, block_columns(dtype))
    splits = max(1, PROGRAMS * multiprocessors // max(blocks, 1))
    return triton.cdiv(triton.cdiv(tokens, splits), TOKENS * UNROLL) * TOKENS * UNROLL


@triton.jit
def sum_tokens(
    x, row_mask, sums, suspect, tokens, features, x_stride, split_tokens,
    BOTH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum one block of columns over one split of the tokens.

    The rounding error of `t = s + v`, `v - (t - s)`, is summed separately. It is dropped where the sum overflows, because it is NaN there.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * split_tokens
    place = x + (begin + lane).to(tl.int64)[:, None] * x_stride + column[None, :]
    step = tl.full((), TOKENS, tl.int64) * x_stride
    squares = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    squares_lost = squares
    plain = squares
    plain_lost = squares
    for token in tl.range(begin, min(begin + split_tokens, tokens), TOKENS, loop_unroll_factor=UNROLL):
        used = token + lane < tokens
        if row_mask is not None:
            used &= tl.load(row_mask + token + lane, mask=used, other=0) != 0
        value = tl.load(place, mask=used[:, None] & (column < features)[None, :], other=0.0).to(tl.float32)
        place += step
        total = squares + value * value
        squares_lost += value * value - (total - squares)
        squares = total
        if BOTH:
            total = plain + value
            plain_lost += value - (total - plain)
            plain = total
    out = sums + tl.program_id(1).to(tl.int64) * (features * (2 if BOTH else 1)) + column
    store_sum(out, suspect, squares, squares_lost, column < features)
    if BOTH:
        store_sum(out + features, suspect, plain, plain_lost, column < features)


@triton.jit
def store_sum(out, suspect, sums, lost, inside):
    """Store the sum over the lanes, with its rounding error, in float64; set `suspect` if it is not finite."""
    finite = tl.abs(sums) < float("inf")
    exact = sums.to(tl.float64) + tl.where(finite, lost, 0.0).to(tl.float64)
    tl.store(out, tl.sum(exact, axis=0), mask=inside)
    tl.store(suspect, 1, mask=tl.min(finite.to(tl.int32)) == 0)


@triton.jit
def add_sums(out, sums, splits, features, out_stride, split_stride, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add `sums.sum(0)` to `out` in float64, in an order that depends only on the sizes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < features
    total = tl.zeros((SPLITS, COLUMNS), dtype=tl.float64)
    for split in range(0, splits, SPLITS):
        lane = split + tl.arange(0, SPLITS)
        place = sums + lane.to(tl.int64)[:, None] * split_stride + column[None, :]
        total += tl.load(place, mask=(lane < splits)[:, None] & inside[None, :], other=0.0)
    place = out + column.to(tl.int64) * out_stride
    before = tl.load(place, mask=inside, other=0.0).to(tl.float64)
    tl.store(place, (before + tl.sum(total, axis=0)).to(tl.float32), mask=inside)


def partial_sums(x: torch.Tensor, *, row_mask: torch.Tensor | None, both: bool) -> Partials:
    """Return the sums of squares of each feature over each split of the tokens.

    Args:
        x: `[tokens, features]`, bfloat16, float16 or float32.
        row_mask: `[tokens]` bool, the tokens to include; None includes all.
        both: also sum the values themselves.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    tokens, features = x.shape
    check_operand("x", x, x, (tokens, features), DTYPES)
    if row_mask is not None:
        check_operand("row_mask", row_mask, x, (tokens,), (torch.bool,))
        row_mask = row_mask.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    each = split_tokens(tokens, features, x.dtype, device_of(x).multiprocessors)
    splits = triton.cdiv(tokens, each) if tokens else 0
    found = Partials(x.new_empty((splits, 1 + both, features), dtype=torch.float64), x.new_zeros((), dtype=torch.int32))
    columns = block_columns(x.dtype)
    with on_device_of(x):
        sum_tokens[(triton.cdiv(features, columns), splits)](
            x, row_mask, *found, tokens, features, x.stride(0), each,
            BOTH=both, TOKENS=TOKENS, COLUMNS=columns, UNROLL=UNROLL, num_warps=WARPS,
        )  # fmt: skip
    return found


def add_(out: torch.Tensor, sums: torch.Tensor) -> None:
    """Add `sums.sum(0)` to `out`.

    Args:
        out: `[features]` float32 of any stride, updated in place.
        sums: `[splits, features]` float64, the squares or the values of `Partials.sums`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    splits, features = sums.shape
    check_operand("out", out, sums, (features,))
    with on_device_of(out):
        add_sums[(triton.cdiv(features, COLUMNS),)](
            out, sums, splits, features, out.stride(0), sums.stride(0), SPLITS=SPLITS, COLUMNS=COLUMNS
        )


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device."""
    numbers = {"tokens": "i32", "features": "i32:16", "x_stride": "i32:16", "split_tokens": "i32:16"}
    for dtype, name in DTYPES.items():
        for both in (False, True):
            yield CompileCase(
                sum_tokens,
                {"x": f"*{name}:16", "row_mask": "*i1:16", "sums": "*fp64:16", "suspect": "*i32:16", **numbers},
                {"BOTH": both, "TOKENS": TOKENS, "COLUMNS": block_columns(dtype), "UNROLL": UNROLL},
                WARPS,
                3,
            )
    yield CompileCase(
        add_sums,
        {"out": "*fp32:16", "sums": "*fp64:16", "splits": "i32", "features": "i32:16", "split_stride": "i32:16"},
        {"out_stride": 1, "SPLITS": SPLITS, "COLUMNS": COLUMNS},
        4,
        3,
    )
