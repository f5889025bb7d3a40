"""`masked_lstsq` in Triton: conjugate gradients on all rows at once. An iteration is one cuBLAS product and one launch of `step`.

Floor of `step`: per weight it reads direction, product, solution, residual and mask, and writes solution, residual and direction, 29 bytes.
On an H200 [4096, 4096] takes 0.11 ms at 4.3 TB/s, beside 1.3 ms of the product (`backends/products.py`). The next direction depends on
the norm of the whole new residual. A row of up to `WIDEST` columns is therefore held in registers and read once. A wider row is read
three times; direction, product and residual, 12 bytes, are then read again from the L2 cache.

A finished row has `gamma`, its squared residual, set to zero and is no longer read or written. Iterations beyond the last therefore change
nothing, and the host may learn later that all rows have finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import GROUP, CompileCase, check_operand, lower_tile_at, lower_tiles, on_device_of

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WIDEST = 16384  # columns that fit in the registers of a multiprocessor, three numbers each
LEAST, WIDE = 2048, 4096  # entries of a program with short rows; columns of a step through a row wider than `WIDEST`
ENTRIES, MAX_WARPS = 512, 32  # entries per warp; warps per program
TILE, TILE_WARPS = 64, 4  # side of a tile of the Gram matrix; warps of its program
NOT_FINITE = tl.constexpr(1)
EXACT_FIT = 1e-6  # share of the initial error that is rounding


class Config(NamedTuple):
    """The tile of a program.

    Attributes:
        rows: rows of the tile.
        columns: columns of the tile.
        whole: whether the tile holds whole rows.
        num_warps: warps per program.
    """

    rows: int
    columns: int
    whole: bool
    num_warps: int


def config(columns: int) -> Config:
    """Return the tile for rows of `columns` entries: one row per program, or several short ones."""
    whole = columns <= WIDEST
    width = max(16, triton.next_power_of_2(columns)) if whole else WIDE
    rows = max(1, LEAST // width)
    return Config(rows, width, whole, min(MAX_WARPS, rows * width // ENTRIES))


@triton.jit
def scale_gram(gram, scale, unit, status, features, stride, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Scale one tile of the lower triangle to a unit diagonal, and store it and its mirror image."""
    tile_row, tile_column = lower_tile_at(tl.program_id(0), tl.cdiv(features, TILE), 1, GROUP)
    row = tile_row * TILE + tl.arange(0, TILE)
    column = tile_column * TILE + tl.arange(0, TILE)
    inside = (row < features)[:, None] & (column < features)[None, :]
    value = tl.load(gram + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    below = column[None, :] <= row[:, None]
    value = tl.where(below, value, 0.0)
    tl.store(status, NOT_FINITE, mask=has_not_finite(value))
    own = tl.load(scale + row, mask=row < features, other=0.0)[:, None]
    value = value * own * tl.load(scale + column, mask=column < features, other=0.0)[None, :]
    value = tl.where(column[None, :] == row[:, None], (own > 0).to(tl.float32), value)
    value = tl.where(below, value, tl.trans(value))
    tl.store(unit + row.to(tl.int64)[:, None] * features + column[None, :], value, mask=inside)
    inside = (column < features)[:, None] & (row < features)[None, :]
    tl.store(unit + column.to(tl.int64)[:, None] * features + row[None, :], tl.trans(value), mask=inside)


@triton.jit
def has_not_finite(value):
    """Return whether a tile has a NaN or Inf."""
    bad = (tl.abs(value) < float("inf")) == 0  # NaN compares false
    return tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def depart(
    weight, start, mask, scale, solution, direction, status, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the initial weights in the basis of the unit diagonal, and as direction their distance from the dense weights."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, :]
    for first in range(0, columns, COLUMNS):
        column = first + lane
        inside = (row < rows) & (column < columns)
        place = row.to(tl.int64) * columns + column
        to = tl.load(scale + column, mask=column < columns, other=0.0)
        keep = tl.load(mask + place, mask=inside, other=0) != 0
        dense = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(status, NOT_FINITE, mask=has_not_finite(dense))
        origin = dense
        if start is not None:
            origin = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(status, NOT_FINITE, mask=has_not_finite(origin))
        origin = tl.where(keep, origin * to, 0.0)
        tl.store(solution + place, origin, mask=inside)
        tl.store(direction + place, dense * to - origin, mask=inside)


@triton.jit
def begin(
    direction, product, residual, mask, gamma, error, floor, last, exact_fit, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the first residual, which is also the first direction, and the scalars of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    errors = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    squares = errors
    lane = tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, :]
    for first in range(0, columns, COLUMNS):
        column = first + lane
        inside = here[:, None] & (column < columns)
        place = row.to(tl.int64)[:, None] * columns + column
        p = tl.load(product + place, mask=inside, other=0.0)
        errors += tl.load(direction + place, mask=inside, other=0.0) * p
        r = tl.where(tl.load(mask + place, mask=inside, other=0) != 0, p, 0.0)
        squares += r * r
        tl.store(residual + place, r, mask=inside)
        tl.store(direction + place, r, mask=inside)
    whole = tl.sum(errors, axis=1)
    tl.store(error + row, whole, mask=here)
    tl.store(floor + row, exact_fit * whole, mask=here)
    tl.store(gamma + row, tl.sum(squares, axis=1), mask=here)
    tl.store(last + row, tl.full((ROWS,), float("inf"), tl.float32), mask=here)


@triton.jit(do_not_specialize=["iteration"])
def step(
    direction, product, solution, residual, mask, gamma, error, floor, last, latest, tolerance, iteration, rows, columns,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Run one iteration of the active rows, given the product of their directions; set `latest` if a row stays active.

    Pruned entries are zero in direction, residual and solution.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    before = tl.load(gamma + row, mask=row < rows, other=0.0)
    active = before > 0
    if tl.max(active.to(tl.int32), axis=0) > 0:
        error_before = tl.load(error + row, mask=active, other=0.0)
        least = tl.load(floor + row, mask=active, other=0.0)
        decrease_before = tl.load(last + row, mask=active, other=0.0)
        lane = tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, :]
        place = tl.arange(0, ROWS)[:, None] * columns + lane
        origin = tl.program_id(0).to(tl.int64) * (ROWS * columns)
        direction += origin
        product += origin
        solution += origin
        residual += origin
        mask += origin
        if WHOLE:
            inside = active[:, None] & (lane < columns)
            keep = tl.load(mask + place, mask=inside, other=0) != 0
            p = tl.where(keep, tl.load(product + place, mask=inside, other=0.0), 0.0)
            d = tl.load(direction + place, mask=inside, other=0.0)
            alpha = ratio(before, tl.sum(d * p, axis=1))
            r = tl.load(residual + place, mask=inside, other=0.0) - alpha[:, None] * p
            after = tl.sum(r * r, axis=1)
            tl.store(residual + place, r, mask=inside)
            s = tl.load(solution + place, mask=inside, other=0.0)
            tl.store(solution + place, s + alpha[:, None] * d, mask=inside)
            tl.store(direction + place, r + ratio(after, before)[:, None] * d, mask=inside)
        else:
            sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for first in range(0, columns, COLUMNS):
                inside = active[:, None] & (first + lane < columns)
                d = tl.load(direction + place + first, mask=inside, other=0.0)
                sums += d * tl.load(product + place + first, mask=inside, other=0.0)
            alpha = ratio(before, tl.sum(sums, axis=1))
            sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for first in range(0, columns, COLUMNS):
                inside = active[:, None] & (first + lane < columns)
                keep = tl.load(mask + place + first, mask=inside, other=0) != 0
                p = tl.load(product + place + first, mask=inside, other=0.0)
                r = tl.load(residual + place + first, mask=inside, other=0.0) - alpha[:, None] * tl.where(keep, p, 0.0)
                sums += r * r
                tl.store(residual + place + first, r, mask=inside)
            after = tl.sum(sums, axis=1)
            beta = ratio(after, before)
            tl.debug_barrier()  # threads read residuals that other threads wrote
            for first in range(0, columns, COLUMNS):
                inside = active[:, None] & (first + lane < columns)
                d = tl.load(direction + place + first, mask=inside, other=0.0)
                r = tl.load(residual + place + first, mask=inside, other=0.0)
                s = tl.load(solution + place + first, mask=inside, other=0.0)
                tl.store(solution + place + first, s + alpha[:, None] * d, mask=inside)
                tl.store(direction + place + first, r + beta[:, None] * d, mask=inside)
        tl.debug_barrier()  # all warps have read what one of them now writes
        decrease = alpha * before
        left = error_before - decrease
        going = active & (after > 0) & (decrease + decrease_before > tolerance * tl.maximum(left, least))
        tl.store(error + row, left, mask=active)
        tl.store(last + row, decrease, mask=active)
        tl.store(gamma + row, tl.where(going, after, 0.0), mask=active)
        tl.store(latest, iteration, mask=tl.max(going.to(tl.int32), axis=0) > 0)


@triton.jit
def ratio(a, b):
    """Return `a / b` where `b` is positive, else zero."""
    return tl.where(b > 0, tl.div_rn(a, tl.where(b > 0, b, 1.0)), 0.0)


@dataclass(frozen=True)
class Rows:
    """The state of all rows, in the basis in which the damped Gram matrix has ones on its diagonal.

    All tensors are float32 if not noted otherwise.

    Attributes:
        unit: `[columns, columns]`, the damped Gram matrix in that basis.
        to_weight: `[columns]`; a solution times it is a weight.
        mask: `[rows, columns]` uint8, the kept entries.
        solution: `[rows, columns]`, zero where pruned.
        residual: `[rows, columns]`, zero where pruned.
        direction: `[rows, columns]`, zero where pruned after `begin_`.
        product: `[rows, columns]`, `direction` times `unit`, written by the caller.
        gamma: `[rows]`, squared norm of the residual; zero for a finished row.
        error: `[rows]`, the remaining error.
        floor: `[rows]`, the error that counts as an exact fit.
        last: `[rows]`, decrease of the error by the latest iteration.
        latest: int32 on the device, the last iteration that left a row active.
        status: int32 on the device, `NOT_FINITE` if an argument has a NaN or Inf.
    """

    unit: torch.Tensor
    to_weight: torch.Tensor
    mask: torch.Tensor
    solution: torch.Tensor
    residual: torch.Tensor
    direction: torch.Tensor
    product: torch.Tensor
    gamma: torch.Tensor
    error: torch.Tensor
    floor: torch.Tensor
    last: torch.Tensor
    latest: torch.Tensor
    status: torch.Tensor

    def begin_(self) -> None:
        """Start the iterations, given the product of the direction that `depart_` stored."""
        numbers = self.gamma, self.error, self.floor, self.last
        self._launch(begin, self.direction, self.product, self.residual, self.mask, *numbers, EXACT_FIT)

    def step_(self, tolerance: float, iteration: int) -> None:
        """Run one iteration, given the product of the direction. Iterations are counted from one."""
        vectors = self.direction, self.product, self.solution, self.residual, self.mask
        numbers = self.gamma, self.error, self.floor, self.last, self.latest
        tile = config(self.solution.shape[1])
        self._launch(step, *vectors, *numbers, tolerance, iteration, tile=tile, WHOLE=tile.whole)

    def depart_(self, weight: torch.Tensor, start: torch.Tensor | None, scale: torch.Tensor) -> None:
        """Store the initial solution and, as direction, its distance from the dense weight; `scale` is `[columns]` float32."""
        self._launch(depart, weight, start, self.mask, scale, self.solution, self.direction, self.status)

    def _launch(self, kernel: triton.JITFunction, *arguments: object, tile: Config | None = None, **constants: object) -> None:
        rows, columns = self.solution.shape
        tile = tile or config(min(columns, WIDE))
        with on_device_of(self.solution):
            kernel[(triton.cdiv(rows, tile.rows),)](
                *arguments, rows, columns, ROWS=tile.rows, COLUMNS=tile.columns, **constants, num_warps=tile.num_warps
            )


def prepare(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, start: torch.Tensor | None, damping: float) -> Rows:
    """Return the state before the first product, on which `begin_` then works.

    Args:
        weight: `[rows, columns]`, bfloat16, float16 or float32.
        gram: `[columns, columns]` float32, of which the lower triangle is read.
        mask: `[rows, columns]` bool, the entries to keep.
        start: initial weights in the shape and dtype of `weight`; None starts from `weight`.
        damping: share of the mean diagonal added to the diagonal.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    rows, columns = weight.shape
    check_operand("weight", weight, weight, (rows, columns), DTYPES)
    check_operand("gram", gram, weight, (columns, columns))
    check_operand("mask", mask, weight, (rows, columns), (torch.bool,))
    if start is not None:
        check_operand("start", start, weight, (rows, columns), (weight.dtype,))
        start = start.contiguous()
    gram = gram if gram.stride(1) == 1 else gram.contiguous()
    diagonal = gram.diagonal().double()
    damped, dead = diagonal + damping * diagonal.mean(), diagonal <= 0
    to_basis, to_weight = (root.masked_fill(dead, 0).float() for root in (damped.sqrt(), damped.rsqrt()))
    unit = torch.empty_like(gram, memory_format=torch.contiguous_format)
    solution, residual, direction, product = (gram.new_empty((rows, columns)) for _ in range(4))
    gamma, error, floor, last = gram.new_empty((4, rows))
    latest, status = torch.zeros(2, dtype=torch.int32, device=weight.device)
    keep = mask.contiguous().view(torch.uint8)
    vectors = solution, residual, direction, product
    state = Rows(unit, to_weight, keep, *vectors, gamma, error, floor, last, latest, status)
    with on_device_of(gram):
        scale_gram[(lower_tiles(triton.cdiv(columns, TILE), 1),)](
            gram, to_weight, unit, status, columns, gram.stride(0), TILE=TILE, GROUP=GROUP, num_warps=TILE_WARPS
        )
    state.depart_(weight.contiguous(), start, to_basis)
    return state


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device."""
    matrix, number = "*fp32:16", "i32:16"
    yield CompileCase(
        scale_gram,
        {"gram": matrix, "scale": matrix, "unit": matrix, "status": "*i32", "features": number, "stride": number},
        {"TILE": TILE, "GROUP": GROUP},
        TILE_WARPS,
        3,
    )
    state = {
        **dict.fromkeys(("direction", "product", "residual", "gamma", "error", "floor", "last"), matrix),
        "mask": "*u8:16", "rows": "i32", "columns": number,
    }  # fmt: skip
    for columns in (64, 4096, 8192, WIDEST, 2 * WIDEST):
        tile = config(columns)
        constants = {"WHOLE": tile.whole, "ROWS": tile.rows, "COLUMNS": tile.columns}
        settings = {"latest": "*i32:16", "tolerance": "fp32", "iteration": "i32"}
        yield CompileCase(step, {**state, "solution": matrix, **settings}, constants, tile.num_warps, 3)
    tile = config(WIDE)
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    yield CompileCase(begin, {**state, "exact_fit": "fp32"}, shape, tile.num_warps, 3)
    made = {**dict.fromkeys(("scale", "solution", "direction"), matrix), "status": "*i32"}
    sizes = {name: state[name] for name in ("mask", "rows", "columns")}
    for name in DTYPES.values():
        yield CompileCase(depart, {**dict.fromkeys(("weight", "start"), f"*{name}:16"), **made, **sizes}, shape, tile.num_warps, 3)
    yield CompileCase(depart, {"weight": matrix, **made, **sizes}, {"start": None, **shape}, tile.num_warps, 3)
