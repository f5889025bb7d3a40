"""`reverse_cholesky` around cuSOLVER: what turns the matrix round, and back, is fused into the copies that have to be made.

With `J` the reversal, `J H J = U^T U` gives `H = V V^T` for `V = J U^T J`. cuSOLVER works column by column, so `U` lies in memory as
the rows of `U^T`, and turning a contiguous matrix round both ways is reading its memory backwards: `V` takes no transposition. On the
way in, the lower triangle of the Gram matrix is written where `U` will be, turned round and transposed tile by tile.

Floor: cuSOLVER's `features^3 / 3` operations; beside them half a matrix is read and written going in, and a whole one coming out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

TILE = 64  # of the transposition
ROWS, COLUMNS = 8, 256  # of a copy
WARPS = 4
NOT_FINITE = tl.constexpr(1)


class Factor(NamedTuple):
    """Of one attempt: `factor` is `[features, features]`; `failed` and `not_finite` are int32 on the device, 0 if all is well."""

    factor: torch.Tensor
    failed: torch.Tensor
    not_finite: torch.Tensor


@triton.jit
def damp_and_reverse(gram, shift, operand, status, features, stride, TILE: tl.constexpr):
    """One tile of the lower triangle: dead features get a diagonal of one, the others are shifted."""
    # The tiles of a lower triangle, two rows of them at a time: the first has what the last lacks.
    x, y, tiles = tl.program_id(0), tl.program_id(1), tl.cdiv(features, TILE)
    tile_row = tl.where(x <= y, y, tiles - 1 - y)
    tile_column = tl.where(x <= y, x, x - y - 1)
    if (x <= y) | (tile_row != y):
        row = tile_row * TILE + tl.arange(0, TILE)[:, None]
        column = tile_column * TILE + tl.arange(0, TILE)[None, :]
        inside = (row < features) & (column <= row)
        value = tl.load(gram + row.to(tl.int64) * stride + column, mask=inside, other=0.0)
        bad = (tl.abs(value) < float("inf")) == 0  # a NaN is below nothing
        if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
            tl.store(status, NOT_FINITE)
        damped = tl.where(value == 0.0, 1.0, value + tl.load(shift))
        value = tl.trans(tl.where(row == column, damped, value))
        row = tile_row * TILE + tl.arange(0, TILE)[None, :]
        column = tile_column * TILE + tl.arange(0, TILE)[:, None]
        place = operand + (features - 1 - column).to(tl.int64) * features + (features - 1 - row)
        tl.store(place, value, mask=(row < features) & (column <= row))


@triton.jit
def read_backwards(upper, gram, mark, factor, features, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`V` from the memory of `U`: zeros below the diagonal, and on it the mark of dead features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < features) & (column < features)
    place = row.to(tl.int64) * features + column
    last = features.to(tl.int64) * features - 1
    value = tl.load(upper + (last - place), mask=inside & (row <= column), other=0.0)
    on_diagonal = inside & (row == column)
    own = tl.load(gram + row.to(tl.int64) * (stride + 1) + tl.zeros_like(column), mask=on_diagonal, other=1.0)
    tl.store(factor + place, tl.where(on_diagonal & (own == 0.0), tl.load(mark), value), mask=inside)


def attempt(gram: torch.Tensor, damping: float) -> Factor:
    """Factor `gram` `[features, features]` float32, of which the lower triangle is read, with that damping."""
    features = len(gram)
    check_operand("gram", gram, gram, (features, features))
    gram = gram if gram.stride(1) == 1 else gram.contiguous()
    diagonal = gram.diagonal()
    shift = damping * diagonal.double().mean()
    shift, mark = shift.float(), -shift.sqrt().float()
    operand, factor = (
        torch.empty_like(gram, memory_format=torch.contiguous_format),
        torch.empty_like(gram, memory_format=torch.contiguous_format),
    )
    not_finite = torch.zeros((), dtype=torch.int32, device=gram.device)
    tiles = triton.cdiv(features, TILE)
    with on_device_of(gram):
        damp_and_reverse[(tiles + 1, triton.cdiv(tiles, 2))](
            gram, shift, operand, not_finite, features, gram.stride(0), TILE=TILE, num_warps=WARPS
        )
        # The rows of `operand` are columns to cuSOLVER: it reads the triangle that was written, and copies without transposing.
        upper, failed = torch.linalg.cholesky_ex(operand.mT, upper=True)
        read_backwards[(triton.cdiv(features, ROWS), triton.cdiv(features, COLUMNS))](
            upper.mT.contiguous(), gram, mark, factor, features, gram.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return Factor(factor, failed, not_finite)


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """What is shipped, for every device the same."""
    matrix, number = "*fp32:16", {"features": "i32:16", "stride": "i32:16"}
    yield CompileCase(
        damp_and_reverse,
        {"gram": matrix, "shift": "*fp32", "operand": matrix, "status": "*i32", **number},
        {"TILE": TILE},
        WARPS,
        3,
    )
    yield CompileCase(
        read_backwards,
        {"upper": matrix, "gram": matrix, "mark": "*fp32", "factor": matrix, **number},
        {"ROWS": ROWS, "COLUMNS": COLUMNS},
        WARPS,
        3,
    )
