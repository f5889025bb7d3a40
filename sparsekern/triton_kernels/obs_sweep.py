"""`obs_sweep` in Triton: the work inside one block of columns. The loop over blocks is in `sparsekern.backends.obs_sweep`.

Floor of the whole sweep: `rows * columns^2` operations in the products between blocks, which are not computed here. Inside a block each
column waits for the previous one, so latency bounds this kernel. In the machine code for sm_90 a column has 51 instructions and four
shuffles for a given mask, 140 of float32 and 229 of 16 bits where 2:4 is chosen: at an instruction a cycle 0.1, 0.3 and 0.5 ms for 4096
columns. Each weight is read and written once, 0.02 ms for 4096 x 4096.

A program owns 16 rows and takes a block in sub-blocks of `WIDTH` columns, whose current weights it holds in registers:
    now = weight + (pending + sum over earlier columns of the block of delta V) V_ss^-1.
With `diag(V_ss) V_ss^-1 = I + R`, R strictly upper triangular, pruning column j is one rank-1 update, `now -= now_j R_j`. It leaves
column j and all columns to its left unchanged. A column therefore costs one masked sum, which reads it, and one multiply-add per element.
* The explicit inverse of a whole block would be inaccurate; that of a 32-column triangle is as accurate as substitution. Between
  sub-blocks, as between blocks, V itself is multiplied: three TF32 passes on the tensor cores, with the accuracy of float32.
* From compute capability 9 on a warp owns whole rows, unless groups are of 7 or more than 32, four lanes each, so that no warp waits for another inside the loop over columns. The loop
  is unrolled. The compiler then knows which of a lane's registers can hold a column, and the masked sum reads two registers instead of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from ._common import CompileCase, device_of, on_device_of

ROWS = 16  # rows per program
CHUNK = 32  # earlier columns of the block multiplied at a time
SCAN = 4096  # values read by a program of `find_not_finite`: 32 or 64 bytes in flight per thread
COMPILED = (
    (2, 4),
    (1, 2),
    (2, 3),
    (3, 7),
    (4, 8),
    (16, 32),
    (5, 64),
)


class Config(NamedTuple):
    """The shape of a program.

    Attributes:
        part: columns of one pass of the loop over a sub-block, whole groups.
        width: columns of a sub-block: as many whole parts as fit in `size`.
        size: columns of a sub-block in registers, a power of two.
        num_warps: warps per program.
    """

    part: int
    width: int
    size: int
    num_warps: int


def config(columns: int, m: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Return the shape of a program for blocks of `columns` columns in groups of `m` (0: none), and weights of `dtype`.

    The shapes that are shipped are those with which ptxas spills nothing, under Triton 3.6 and 3.7. One warp owns all rows where it can: on
    compute capability 8, and with groups of 7, it has too few registers, and two warps wait for each other at each column. Eight warps share
    groups of more than 32. Parts of 16
    columns tell the compiler where a column is, if groups divide them, but those of 16-bit weights in groups of 2 to 4, or on compute
    capability 10 with a given mask, must be shorter.
    """
    size = 16 if columns <= 16 else 32 if m <= 32 else 64
    group = m or 1
    narrow = dtype != torch.float32 and (2 <= m <= 4 or m == 0 and capability >= (10, 0))
    part = max(1, (8 if narrow or 16 % group else 16) // group) * group
    one_warp = capability >= (9, 0) and m != 7
    return Config(part, size // part * part, size, 8 if size == 64 else 1 if one_warp else 2)


@triton.jit
def find_not_finite(x, status, elements, SCAN: tl.constexpr):
    """Set `status` if `x` has a NaN or Inf."""
    index = tl.program_id(0).to(tl.int64) * SCAN + tl.arange(0, SCAN)
    value = tl.load(x + index, mask=index < elements, other=0.0).to(tl.float32)
    tl.store(status, 1, mask=tl.min((tl.abs(value) < float("inf")).to(tl.int32), axis=0) == 0)


@triton.jit
def prepare_triangles(factor, triangles, columns, border, block, last, parts, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Store `R`, `[SIZE, SIZE]`, and one more row, `diag(V_ss)`, for each of the `parts` sub-blocks of each block of each factor.

    Dead columns and padding have a zero in `diag(V_ss)`. A block begins at each multiple of `border` and has `block` columns; the last
    block ends at column `last`.
    """
    index, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    factor += matrix * columns * columns
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
    out = triangles + (matrix * tl.num_programs(0) + index) * ((SIZE + 1) * SIZE)
    tl.store(out + lane[:, None] * SIZE + lane[None, :], triangle)
    tl.store(out + SIZE * SIZE + lane, tl.where(alive, diagonal, 0.0))


@triton.jit
def choose_group(score, kept, lane, group, N: tl.constexpr, M: tl.constexpr, UNROLL: tl.constexpr):
    """Set `kept` for the `N` largest scores of columns `[group, group + M)`; ties go to the lower column."""
    before = tl.zeros(score.shape, tl.int32)
    for i in tl.range(0, M, loop_unroll_factor=UNROLL):
        other = tl.sum(tl.where(lane == group + i, score, 0.0), axis=1)[:, None]
        before += ((other > score) | ((other == score) & (group + i < lane))).to(tl.int32)
    return tl.where((lane >= group) & (lane < group + M), before < N, kept)


@triton.jit
def sweep_block(
    weight, mask, factor, triangle, delta, scores, new_weight, row_error, rows, columns, delta_stride, triangle_stride, width,
    SCORE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    PART: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sweep `width` columns of some rows of one weight of the batch; all pointers point at the first of these columns.

    With `M`, keeps `N` of every `M` columns, chosen from the current weights when the sweep reaches the group, and writes `mask`;
    otherwise reads `mask`. With `SCORE`, prunes nothing and stores in `scores` the cost of removing each weight. `delta` holds the
    pending updates on entry and the change of each weight on return. With `SCORE`, `delta` and `scores` have `delta_stride` elements a
    row.
    """
    GROUP: tl.constexpr = M if M > 0 else PART
    UNROLL: tl.constexpr = GROUP if GROUP <= 16 else 8
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row, lane, chunk = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, CHUNK)
    in_rows = row0 + row < rows
    unit = tl.arange(0, SIZE)[:, None]
    matrix = tl.program_id(1).to(tl.int64)
    weight += matrix * rows * columns
    factor += matrix * columns * columns
    triangle += matrix * triangle_stride
    delta += matrix * rows * delta_stride
    row_error += matrix * rows
    if SCORE:
        scores += matrix * rows * delta_stride
    else:
        mask += matrix * rows * columns
        new_weight += matrix * rows * columns
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
            # Reading the weight again saves the registers that would hold it.
            again = tl.load(weight + origin + first + tile, mask=here & alive, other=0.0).to(tl.float32)
            tl.store(delta + delta_origin + first + delta_tile, again - new, mask=here)
        tl.debug_barrier()  # later sub-blocks read `delta` across threads
        triangle += (SIZE + 1) * SIZE
    if not SCORE:
        own = row0 + tl.arange(0, ROWS)
        tl.store(row_error + own, tl.load(row_error + own, mask=own < rows, other=0.0) + error, mask=own < rows)


class Block(Protocol):
    """The columns of a block; see `sparsekern.backends.obs_sweep.Block`."""

    @property
    def last(self) -> int: ...

    @property
    def border(self) -> int: ...


class Sweep(Protocol):
    """The tensors of one sweep; see `sparsekern.backends.obs_sweep.Sweep`."""

    @property
    def blocks(self) -> Sequence[Block]: ...

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def factor(self) -> torch.Tensor: ...

    @property
    def mask(self) -> torch.Tensor: ...

    @property
    def delta(self) -> torch.Tensor: ...

    @property
    def new_weight(self) -> torch.Tensor: ...

    @property
    def row_error(self) -> torch.Tensor: ...

    @property
    def status(self) -> torch.Tensor: ...


class Triangles(NamedTuple):
    """The triangles of all sub-blocks of a sweep, as `prepare_triangles` stores them.

    Attributes:
        tiles: the shape of the programs that they are prepared for.
        parts: sub-blocks per block.
        values: `[blocks * parts, size + 1, size]` float32, with the leading dimension of a batch.
    """

    tiles: Config
    parts: int
    values: torch.Tensor


class TritonKernels:
    """The kernels of one sweep; see `sparsekern.backends.obs_sweep.Kernels`. A launch serves all weights of a batch."""

    def __init__(self, state: Sweep) -> None:
        self._state, self._mask = state, state.mask.view(torch.uint8)
        self._prepared: Triangles | None = None  # by the first call: all groups of a sweep have one size

    def check_values(self) -> None:
        """Set the status if the weight or the factor has a NaN or Inf."""
        with on_device_of(self._state.weight):
            for x in (self._state.weight, self._state.factor):
                find_not_finite[(triton.cdiv(x.numel(), SCAN),)](x, self._state.status, x.numel(), SCAN=SCAN, num_warps=8)

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        """Prune columns `[first, last)` to the mask of the sweep, or with `m` to N of every M columns."""
        self._run(first, last, self._state.delta[..., first:], None, n, m)

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        """Return False: the best weights are chosen by the caller, from their scores."""
        return False

    def together(self, choice: str) -> int:
        """Return one: each block is a launch of its own."""
        return 1

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        """Store the cost of removing each weight of columns `[first, last)`; `delta` and `scores` begin with column `origin`."""
        self._run(first, last, delta[..., first - origin :], scores[..., first - origin :], 0, 0)

    def _run(self, first: int, last: int, delta: torch.Tensor, scores: torch.Tensor | None, n: int, m: int) -> None:
        state = self._state
        *batch, rows, columns = state.weight.shape
        with on_device_of(delta):
            if self._prepared is None:
                self._prepared = self._prepare(m)
            tiles = self._prepared.tiles
            mask, new_weight = (None, None) if scores is not None else (self._mask[..., first:], state.new_weight[..., first:])
            sweep_block[(triton.cdiv(rows, ROWS), math.prod(batch))](
                state.weight[..., first:], mask, state.factor[..., first:, first:], self._triangle(self._prepared, first), delta, scores,
                new_weight, state.row_error, rows, columns, delta.stride(-2), math.prod(self._prepared.values.shape[-3:]),
                last - first, **_constants(tiles, scores is not None, n, m),
                num_warps=tiles.num_warps, num_stages=1,
            )  # fmt: skip

    def _prepare(self, m: int) -> Triangles:
        blocks, factor = self._state.blocks, self._state.factor
        tiles = config(blocks[0].last, m, self._state.weight.dtype, device_of(factor).capability)
        parts = triton.cdiv(blocks[0].last, tiles.width)
        batch, all_parts = factor.shape[:-2], len(blocks) * parts
        triangles = factor.new_empty((*batch, all_parts, tiles.size + 1, tiles.size))
        prepare_triangles[(all_parts, batch.numel())](
            factor, triangles, factor.shape[-1], blocks[0].border, blocks[0].last, blocks[-1].last, parts,
            WIDTH=tiles.width, SIZE=tiles.size,
        )  # fmt: skip
        return Triangles(tiles, parts, triangles)

    def _triangle(self, triangles: Triangles, first: int) -> torch.Tensor:
        """Return the triangle of the sub-block that begins at column `first`; those of the next sub-blocks follow it in memory."""
        block, inside = divmod(first, self._state.blocks[0].border)
        return triangles.values[..., block * triangles.parts + inside // triangles.tiles.width, :, :]


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
    """Yield the shipped configurations for devices of `capability`."""
    for score, n, m in ((True, 0, 0), (False, 0, 0), *((False, n, m) for n, m in COMPILED)):
        yield _case("bf16", score, n, m, capability)
    for dtype, n, m in (("fp32", 2, 4), ("fp32", 3, 5), ("fp16", 2, 4)):
        yield _case(dtype, False, n, m, capability)
    for tiles in sorted(
        {config(128, m, torch.float32, capability)._replace(part=0, num_warps=4) for m in (0, *(m for _, m in COMPILED))}
    ):
        constants = {"WIDTH": tiles.width, "SIZE": tiles.size}
        numbers = dict.fromkeys(("columns", "border", "block", "last"), "i32:16") | {"parts": "i32"}
        yield CompileCase(
            prepare_triangles, {"factor": "*fp32:16", "triangles": "*fp32:16", **numbers}, constants, tiles.num_warps, 3
        )
    for dtype in ("fp32", "bf16", "fp16"):
        yield CompileCase(find_not_finite, {"x": f"*{dtype}:16", "status": "*i32:16", "elements": "i64:16"}, {"SCAN": SCAN}, 8, 3)


def _case(dtype: str, score: bool, n: int, m: int, capability: tuple[int, int]) -> CompileCase:
    tiles = config(128, m, torch.float32 if dtype == "fp32" else torch.bfloat16, capability)
    pointers = {
        "weight": dtype, "factor": "fp32", "triangle": "fp32", "delta": "fp32", "row_error": "fp32",
        **({"scores": "fp32"} if score else {"mask": "u8", "new_weight": dtype}),
    }  # fmt: skip
    absent = ("mask", "new_weight") if score else ("scores",)
    return CompileCase(
        sweep_block,
        {name: f"*{kind}:16" for name, kind in pointers.items()}
        | dict.fromkeys(("rows", "columns", "delta_stride", "triangle_stride", "width"), "i32:16"),
        {**dict.fromkeys(absent), **_constants(tiles, score, n, m)},
        tiles.num_warps,
        1,
    )
