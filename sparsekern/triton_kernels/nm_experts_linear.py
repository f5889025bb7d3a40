"""`nm_experts_linear` in Triton: tokens times the packed N:M weights of their experts, all experts in one launch.

Floor, on an H200: the packed bytes of the experts that are named, at 4.8 TB/s. One token with 8 experts of [1536, 2048] in 2:4 16-bit
values reads 28.3 MB, 5.9 us; the dense weights take 10.5 us. 16 tokens with 8 of 64 experts reach 56 of them, 41 us. The launches: one
for one token; one more, which groups them, for more tokens.

The parts are those of `nm_linear`:

* One token: the factors of the values are gathered from `x`.
* More tokens, 16-bit values and M of 4: groups of 4 columns are expanded for the tensor cores, once for a job of 16 tokens, or of 64 if
  the experts have 32 tokens each on the average.
* More tokens otherwise: the factors of 4 tokens are gathered, so that a long prompt reads each weight once for every 4 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layouts.packed_rows import code_bits, stored_per_row
from ._common import CompileCase, check_operand, device_of, on_device_of
from ._experts import MANY, check_experts, columns_of, has_job, job_of, jobs_of, width_of
from ._packed_linear import COLUMNS, DTYPES, MOST_TOKENS, as_bias, as_matrix, store_product, warps_for
from .nm_linear import TILE, WARPS, config, layout_of, multiply_expanded, multiply_picked

PICKED = 4  # most tokens of a job whose factors are gathered


class Config(NamedTuple):
    """The shape of a program.

    Attributes:
        width: the most pairs of a job.
        warps: warps per program.
        rows: rows per program.
        expanded: whether groups of 4 columns are expanded for the tensor cores.
    """

    width: int
    warps: int
    rows: int
    expanded: bool


def config_of(experts: torch.Tensor, count: int, rows: int, columns: int, n: int, m: int, x: torch.Tensor) -> Config:
    """Return the shape of a program for `count` experts of `[rows, columns]`."""
    width, multiprocessors = width_of(experts, count, x.dtype), device_of(x).multiprocessors
    hit = rows * min(experts.numel(), count)  # rows that are multiplied at the same time
    if width > 1 and m == 4 and x.dtype != torch.float32:
        return Config(width, warps_for(triton.cdiv(hit, TILE), columns, WARPS, multiprocessors), TILE, True)
    width = min(width, PICKED)
    tiles = config(hit, columns // m * n, width, multiprocessors)
    return Config(width, tiles.warps, tiles.rows, False)


@triton.jit(do_not_specialize=["pairs", "choices", "experts", "jobs"])
def multiply(
    x, ids, places, values, codes, status, bias, y, pairs, choices, experts, jobs, columns, rows, x_stride, kept, stored,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, EXPANDED: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply some rows of one expert by the pairs of one job."""
    job, tile = tl.program_id(0) % jobs, tl.program_id(0) // jobs
    if has_job(places, job):
        expert, known, pair, present = job_of(ids, places, job, pairs, experts, status, WIDTH)
        first = tile.to(tl.int64) * ROWS
        row = expert * rows + first
        values += row * stored
        codes += row * (stored * BITS // 32)
        x_row = (pair // choices).to(tl.int64) * x_stride
        if EXPANDED:
            sums = multiply_expanded(
                x, values, codes, first, columns, rows, stored, x_row, present,
                N, BITS, BLOCK, BLOCK_SLOTS, WIDTH, PIECES, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            sums = multiply_picked(
                x, values, codes, first, columns, rows, kept, stored, x_row, 1,
                N, M, BITS, BLOCK, BLOCK_SLOTS, WIDTH, ROWS, 32 * PIECES,
            )  # fmt: skip
        # Reading the job again saves the registers that would hold it.
        expert, known, pair, present = job_of(ids, places, job, pairs, experts, None, WIDTH)
        sums = tl.where(known, sums, float("nan"))
        if bias is not None:
            bias += expert * rows
        store_product(sums, y, bias, None, first, rows, pair.to(tl.int64) * rows, present, ROWS)


def product(
    x: torch.Tensor,
    experts: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    n: int,
    m: int,
    bias: torch.Tensor | None,
    status: torch.Tensor | None,
) -> torch.Tensor:
    """Return the products of each row of `x` with its experts, `[tokens, choices, rows]`; NaN where an id names no expert.

    Args:
        x: `[tokens, columns]`, bfloat16, float16 or float32.
        experts: `[tokens, choices]` int64.
        values: `[experts, rows, stored]` in the dtype of `x`, contiguous.
        codes: `[experts, rows, stored * bits / 32]` int32, contiguous.
        n: values kept of each group.
        m: columns of a group.
        bias: `[experts, rows]` in the dtype of `x`, or None.
        status: int32 scalar, set if an id names no expert; None skips the check.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    count, rows = values.shape[:2]
    check_experts(x, experts, count)
    columns, choices = x.shape[1], experts.shape[1]
    stored = stored_per_row(columns, n, m, x.dtype)
    check_operand("values", values, x, (count, rows, stored), (x.dtype,))
    check_operand("codes", codes, x, (count, rows, stored * code_bits(m) // 32), (torch.int32,))
    x, bias = as_matrix(x), as_bias(bias, (count, rows), x)
    y = x.new_empty((len(x), choices, rows))
    if y.numel():
        tiles = config_of(experts, count, rows, columns, n, m, x)
        with on_device_of(x):
            jobs = jobs_of(experts, count, tiles.width)
            multiply[(triton.cdiv(rows, tiles.rows) * jobs.most,)](
                x, jobs.ids, jobs.places, values, codes, status, bias, y,
                len(jobs.ids), choices, count, jobs.most, columns, rows, x.stride(0), columns // m * n, stored,
                **_constants(x.dtype, n, m, tiles), num_warps=tiles.warps, num_stages=1,
            )  # fmt: skip
    return y


def _constants(dtype: torch.dtype, n: int, m: int, tiles: Config) -> dict[str, object]:
    shape = {"WIDTH": tiles.width, "EXPANDED": tiles.expanded, "PIECES": tiles.warps, "ROWS": tiles.rows}
    columns = min(columns_of(tiles.width), COLUMNS // 2 if n > 2 else COLUMNS)  # more values take more registers
    return {**layout_of(dtype, n, m), **shape, "COLUMNS": columns}


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the configurations that need the most registers, the same for every device."""
    for dtype, n, m, tiles in (
        (torch.bfloat16, 2, 4, Config(1, 8, 16, False)),
        (torch.bfloat16, 4, 8, Config(PICKED, 8, 8, False)),
        (torch.float32, 3, 7, Config(PICKED, 8, 8, False)),
        (torch.bfloat16, 3, 4, Config(MOST_TOKENS, WARPS[0], TILE, True)),
        (torch.float16, 2, 4, Config(MANY, WARPS[0], TILE, True)),
        (torch.bfloat16, 2, 4, Config(MANY, WARPS[1], TILE, True)),
    ):
        own = f"*{DTYPES[dtype]}:16"
        pointers = {"x": own, "ids": "*i64:16", "values": own, "codes": "*i32:16", "bias": own, "y": own}
        absent: dict[str, object] = {"status": None}
        if tiles.width == 1:
            absent["places"] = None
        else:
            pointers["places"] = "*i32:16"
        numbers = dict.fromkeys(("pairs", "choices", "experts", "jobs"), "i32")
        numbers |= dict.fromkeys(("columns", "rows", "x_stride", "kept", "stored"), "i32:16")
        yield CompileCase(multiply, {**pointers, **numbers}, {**absent, **_constants(dtype, n, m, tiles)}, tiles.warps, 1)
