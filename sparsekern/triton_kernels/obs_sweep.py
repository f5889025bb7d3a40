"""`obs_sweep` in Triton: what is done inside one block of columns. The loop over blocks is in `sparsekern.backends.obs_sweep`.

Floor of the whole sweep: rows * columns^2 operations in the products between blocks, which are not done here. Inside a block a column
waits for the one before it, so latency bounds this kernel: some 45 instructions and two shuffles a column for a given mask, 80 where
groups are chosen, about 100 to 130 cycles, 0.3 ms for 4096 columns. It reads and writes each weight once, 0.02 ms for 4096 x 4096.

A program owns 16 rows and takes a block in sub-blocks of `WIDTH` columns, whose weights it holds in registers as they stand *now*:
    now = weight + (pending + sum over earlier columns of the block of delta V) V_ss^-1.
With `diag(V_ss) V_ss^-1 = I + R`, R strictly upper triangular, pruning column j is one rank-1 update, `now -= now_j R_j`, which leaves
column j and all to its left as they are. So a column costs one masked sum, that reads it, and one multiply-add an element.
* An explicit inverse would be poor numerics for a whole block; of a triangle of 32 columns it is as good as substitution. Everything
  between sub-blocks is multiplied by V itself, as between blocks: products on the tensor cores in three TF32 passes, which have the
  accuracy of float32.
* A warp owns whole rows, four lanes each, so that nothing in the loop over columns waits for another warp. The loop is unrolled:
  then it is known which of a lane's registers can hold a column, and the masked sum reads two registers instead of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, device_of, on_device_of

ROWS = 16  # of a program
CHUNK = 32  # earlier columns of the block that are multiplied at a time
SCAN = 4096  # values that a program of `find_not_finite` reads: 32 or 64 bytes a thread in flight
COMPILED = (
    (2, 4),
    (4, 8),
    (3, 5),
    (16, 32),
    (5, 64),
)


class Config(NamedTuple):
    """Sub-blocks of `size` columns in registers, a power of two, of which `width` are used: as many whole groups as there is room."""

    part: int
    width: int
    size: int
    num_warps: int


def config(columns: int, m: int, capability: tuple[int, int]) -> Config:
    """For blocks of so many columns, in groups of `m` (0: none). Groups of more than 32 need the registers of more warps.

    With groups of 5 to 8, ptxas spills a few registers for compute capability 9 and later where two warps share the rows, and for 8
    where one has them all.
    """
    size = 16 if columns <= 16 else 32 if m <= 32 else 64
    part = max(1, 16 // m) * m if m else 16
    one_warp = 5 <= m <= 8 and capability >= (9, 0)
    return Config(part, size // part * part, size, 8 if size == 64 else 1 if one_warp else 2)


@triton.jit
def find_not_finite(x, status, elements, SCAN: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SCAN + tl.arange(0, SCAN)
    value = tl.load(x + index, mask=index < elements, other=0.0).to(tl.float32)
    tl.store(status, 1, mask=tl.min((tl.abs(value) < float("inf")).to(tl.int32), axis=0) == 0)


@triton.jit
def prepare_triangles(factor, triangles, columns, border, block, last, parts, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Of sub-block `p` of `parts` of each block: `R`, `[SIZE, SIZE]`, and in one row more `diag(V_ss)`, 0 if dead or padding.

    A block begins at every multiple of `border` and has `block` columns, the last one those up to column `last`.
    """
    index = tl.program_id(0)
    origin = index // parts * border
    first = (origin + index % parts * WIDTH).to(tl.int64)
    lane = tl.arange(0, SIZE)
    inside = (lane < WIDTH) & (first + lane < min(origin + block, last))
    diagonal = tl.load(factor + (first + lane) * (columns + 1), mask=inside, other=0.0)
    alive = diagonal > 0
    triangle = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(SIZE):  # I + R is the inverse of V_ss diag(V_ss)^-1: the last row first
        i = SIZE - 1 - step
        row = tl.load(factor + (first + i) * columns + first + lane, mask=alive & (lane > i), other=0.0)
        row /= tl.where(alive, diagonal, 1.0)
        found = -row - tl.sum(row[:, None] * triangle, axis=0)
        triangle = tl.where(lane[:, None] == i, found[None, :], triangle)
    out = triangles + index.to(tl.int64) * ((SIZE + 1) * SIZE)
    tl.store(out + lane[:, None] * SIZE + lane[None, :], triangle)
    tl.store(out + SIZE * SIZE + lane, tl.where(alive, diagonal, 0.0))


@triton.jit
def choose_group(score, kept, lane, group, N: tl.constexpr, M: tl.constexpr, UNROLL: tl.constexpr):
    """`kept` with the `N` largest scores of columns `[group, group + M)` set; of equal ones the lower columns."""
    before = tl.zeros(score.shape, tl.int32)
    for i in tl.range(0, M, loop_unroll_factor=UNROLL):
        other = tl.sum(tl.where(lane == group + i, score, 0.0), axis=1)[:, None]
        before += ((other > score) | ((other == score) & (group + i < lane))).to(tl.int32)
    return tl.where((lane >= group) & (lane < group + M), before < N, kept)


@triton.jit
def sweep_block(
    weight, mask, factor, triangle, delta, scores, new_weight, row_error, rows, columns, delta_stride, width,
    SCORE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    PART: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`width` columns of some rows, whose first all the pointers point at.

    With `M`, `N` of every `M` columns are kept, chosen from the weights as they stand when the group is reached, and `mask` is
    written; else it is read. With `SCORE` nothing is pruned, and `scores` gets what removing each weight would cost. `delta` goes
    from what is pending to the change of each weight; with `SCORE` it and `scores` have `delta_stride` elements a row.
    """
    GROUP: tl.constexpr = M if M > 0 else PART
    UNROLL: tl.constexpr = GROUP if GROUP <= 16 else 8
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row, lane, chunk = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, CHUNK)
    in_rows = row0 + row < rows
    unit = tl.arange(0, SIZE)[:, None]
    if not SCORE:
        delta_stride = columns  # the same offsets, in fewer registers
    tile = row * columns + lane
    delta_tile = row * delta_stride + lane
    origin, delta_origin = row0 * columns, row0 * delta_stride
    error = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, WIDTH):
        inside = (lane < WIDTH) & (first + lane < width)
        here = in_rows & inside
        diagonal = tl.load(triangle + SIZE * SIZE + lane)
        alive = diagonal > 0
        start = tl.load(weight + origin + first + tile, mask=here & alive, other=0.0).to(tl.float32)

        sums = tl.load(delta + delta_origin + first + delta_tile, mask=here & alive, other=0.0)
        coefficients = factor + first
        for earlier in range(0, first, CHUNK):
            known = first - earlier
            taken = tl.load(
                delta + delta_origin + earlier + row * delta_stride + chunk[None, :],
                mask=in_rows & (chunk[None, :] < known),
                other=0.0,
            )
            block = tl.load(coefficients + chunk[:, None] * columns + lane, mask=(chunk[:, None] < known) & inside, other=0.0)
            sums = tl.dot(taken, block, sums, input_precision="tf32x3")
            coefficients += tl.cast(columns, tl.int64) * CHUNK
        sums = tl.where(alive, sums, 0.0) / tl.where(alive, diagonal, 1.0)
        now = start + tl.dot(sums, tl.load(triangle + unit * SIZE + lane), sums, input_precision="tf32x3")

        if SCORE:
            tl.store(scores + delta_origin + first + delta_tile, tl.abs(now) * diagonal, mask=here)
            tl.store(delta + delta_origin + first + delta_tile, start - now, mask=here)
        else:
            if M > 0:
                kept = tl.zeros([ROWS, SIZE], tl.int1)
            else:
                kept = tl.load(mask + origin + first + tile, mask=here, other=1) != 0
            for part in range(0, WIDTH, PART):
                for group in tl.static_range(0, PART, GROUP):
                    if M > 0:
                        kept = choose_group(tl.abs(now) * diagonal, kept, lane, part + group, N, M, UNROLL)
                    for j in tl.range(group, group + GROUP, loop_unroll_factor=UNROLL):
                        pruned = tl.sum(tl.where(kept | (lane != part + j), 0.0, now), axis=1)
                        now -= pruned[:, None] * tl.load(triangle + part * SIZE + j * SIZE + lane)
            new = tl.where(kept, now, 0.0)
            column_error = (now - new) * diagonal
            error += tl.sum(column_error * column_error, axis=1)
            tl.store(new_weight + origin + first + tile, new.to(new_weight.dtype.element_ty), mask=here)
            if M > 0:
                tl.store(mask + origin + first + tile, kept.to(tl.uint8), mask=here)
            again = tl.load(weight + origin + first + tile, mask=here & alive, other=0.0).to(
                tl.float32
            )  # held, it would cost registers
            tl.store(delta + delta_origin + first + delta_tile, again - new, mask=here)
        tl.debug_barrier()  # the sub-blocks to come read delta across threads
        triangle += (SIZE + 1) * SIZE
    if not SCORE:
        own = row0 + tl.arange(0, ROWS)
        tl.store(row_error + own, tl.load(row_error + own, mask=own < rows, other=0.0) + error, mask=own < rows)


class TritonKernels:
    """The kernels of one sweep; see `sparsekern.backends.obs_sweep.Kernels`."""

    def __init__(self, state) -> None:
        self._state, self._mask = state, state.mask.view(torch.uint8)
        self._tiles: Config | None = None  # chosen by the first call, with the triangles: a sweep has one kind of groups

    def check_values(self) -> None:
        with on_device_of(self._state.weight):
            for x in (self._state.weight, self._state.factor):
                find_not_finite[(triton.cdiv(x.numel(), SCAN),)](x, self._state.status, x.numel(), SCAN=SCAN, num_warps=8)

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        self._run(first, last, self._state.delta[:, first:], None, n, m)

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        return False

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        self._run(first, last, delta[:, first - origin :], scores[:, first - origin :], 0, 0)

    def _run(self, first: int, last: int, delta: torch.Tensor, scores: torch.Tensor | None, n: int, m: int) -> None:
        state = self._state
        rows, columns = state.weight.shape
        with on_device_of(delta):
            if self._tiles is None:
                self._prepare(m)
            mask, new_weight = (None, None) if scores is not None else (self._mask[:, first:], state.new_weight[:, first:])
            sweep_block[(triton.cdiv(rows, ROWS),)](
                state.weight[:, first:], mask, state.factor[first:, first:], self._triangle(first), delta, scores, new_weight,
                state.row_error, rows, columns, delta.stride(0), last - first, **_constants(self._tiles, scores is not None, n, m),
                num_warps=self._tiles.num_warps, num_stages=1,
            )  # fmt: skip

    def _prepare(self, m: int) -> None:
        blocks, factor = self._state.blocks, self._state.factor
        self._tiles = tiles = config(blocks[0].last, m, device_of(factor).capability)
        self._parts = triton.cdiv(blocks[0].last, tiles.width)
        self._triangles = factor.new_empty((len(blocks) * self._parts, tiles.size + 1, tiles.size))
        prepare_triangles[(len(self._triangles),)](
            factor, self._triangles, len(factor), blocks[0].border, blocks[0].last, blocks[-1].last, self._parts,
            WIDTH=tiles.width, SIZE=tiles.size,
        )  # fmt: skip

    def _triangle(self, first: int) -> torch.Tensor:
        """Those of the sub-blocks from column `first` on."""
        block, inside = divmod(first, self._state.blocks[0].border)
        return self._triangles[block * self._parts + inside // self._tiles.width]


def _constants(tiles: Config, score: bool, n: int, m: int) -> dict[str, object]:
    return {
        "SCORE": score,
        "N": n,
        "M": m,
        "PART": tiles.part,
        "WIDTH": tiles.width,
        "SIZE": tiles.size,
        "ROWS": ROWS,
        "CHUNK": CHUNK,
    }


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """What is shipped for devices of any compute capability."""
    for score, n, m in ((True, 0, 0), (False, 0, 0), *((False, n, m) for n, m in COMPILED)):
        yield _case("bf16", score, n, m, capability)
    for dtype in ("fp32", "fp16"):  # which differ in loads and stores only
        yield _case(dtype, False, 2, 4, capability)
    for tiles in sorted({config(128, m, capability)._replace(num_warps=4) for m in (0, *(m for _, m in COMPILED))}):
        constants = {"WIDTH": tiles.width, "SIZE": tiles.size}
        numbers = dict.fromkeys(("columns", "border", "block", "last"), "i32:16") | {"parts": "i32"}
        yield CompileCase(
            prepare_triangles, {"factor": "*fp32:16", "triangles": "*fp32:16", **numbers}, constants, tiles.num_warps, 3
        )
    for dtype in ("fp32", "bf16", "fp16"):
        yield CompileCase(find_not_finite, {"x": f"*{dtype}:16", "status": "*i32:16", "elements": "i64:16"}, {"SCAN": SCAN}, 8, 3)


def _case(dtype: str, score: bool, n: int, m: int, capability: tuple[int, int]) -> CompileCase:
    tiles = config(128, m, capability)
    pointers = {
        "weight": dtype, "factor": "fp32", "triangle": "fp32", "delta": "fp32", "row_error": "fp32",
        **({"scores": "fp32"} if score else {"mask": "u8", "new_weight": dtype}),
    }  # fmt: skip
    absent = ("mask", "new_weight") if score else ("scores",)
    return CompileCase(
        sweep_block,
        {name: f"*{kind}:16" for name, kind in pointers.items()}
        | dict.fromkeys(("rows", "columns", "delta_stride", "width"), "i32:16"),
        {**dict.fromkeys(absent), **_constants(tiles, score, n, m)},
        tiles.num_warps,
        1,
    )
