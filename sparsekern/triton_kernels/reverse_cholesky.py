"""`reverse_cholesky` around cuSOLVER: the copies that cuSOLVER needs anyway also reverse the matrix, and reverse the factor back.

With `J` the reversal, `J H J = U^T U` gives `H = V V^T` for `V = J U^T J`. cuSOLVER is column-major, so `U` is stored as the rows of
`U^T`. Reversing both axes of a contiguous matrix is reading its memory backwards, so that `V` needs no transposition. On the way in, the
lower triangle of the Gram matrix is reversed and transposed, tile by tile, into the place of `U`.

Floor: the `features^3 / 3` operations of cuSOLVER. Beside them, half a matrix is read and written on the way in, a whole one on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

TILE = 64  # side of a tile of the transposition
ROWS, COLUMNS = 8, 256  # shape of a tile of the copy
WARPS = 4
NOT_FINITE = tl.constexpr(1)


class Factor(NamedTuple):
    """The result of one attempt.

    Attributes:
        factor: `[features, features]` float32, upper triangular.
        failed: int32 scalar on the device, 0 if the factorization succeeded.
        not_finite: int32 scalar on the device, set if the Gram matrix has a NaN or Inf.

    Those of a batch have a leading dimension more.
    """

    factor: torch.Tensor
    failed: torch.Tensor
    not_finite: torch.Tensor


@triton.jit
def damp_and_reverse(gram, shift, operand, status, features, stride, batch_stride, TILE: tl.constexpr):
    """Store one tile of the damped lower triangle of one matrix of the batch, reversed and transposed.

    The diagonal is one for dead features and shifted for all others.
    """
    matrix = tl.program_id(2).to(tl.int64)
    gram += matrix * batch_stride
    operand += matrix * features * features
    # Tile rows are paired, the first with the last, so that every pair has the same number of tiles.
    x, y, tiles = tl.program_id(0), tl.program_id(1), tl.cdiv(features, TILE)
    tile_row = tl.where(x <= y, y, tiles - 1 - y)
    tile_column = tl.where(x <= y, x, x - y - 1)
    if (x <= y) | (tile_row != y):
        row = tile_row * TILE + tl.arange(0, TILE)[:, None]
        column = tile_column * TILE + tl.arange(0, TILE)[None, :]
        inside = (row < features) & (column <= row)
        value = tl.load(gram + row.to(tl.int64) * stride + column, mask=inside, other=0.0)
        bad = (tl.abs(value) < float("inf")) == 0  # NaN compares false
        if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
            tl.store(status + matrix, NOT_FINITE)
        damped = tl.where(value == 0.0, 1.0, value + tl.load(shift + matrix))
        value = tl.trans(tl.where(row == column, damped, value))
        row = tile_row * TILE + tl.arange(0, TILE)[None, :]
        column = tile_column * TILE + tl.arange(0, TILE)[:, None]
        place = operand + (features - 1 - column).to(tl.int64) * features + (features - 1 - row)
        tl.store(place, value, mask=(row < features) & (column <= row))


@triton.jit
def read_backwards(upper, gram, mark, factor, features, stride, batch_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store `V`, read from the memory of `U`, with zeros below the diagonal and the mark of dead features on it."""
    matrix = tl.program_id(2).to(tl.int64)
    gram += matrix * batch_stride
    upper += matrix * features * features
    factor += matrix * features * features
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < features) & (column < features)
    place = row.to(tl.int64) * features + column
    last = tl.cast(features, tl.int64) * features - 1
    value = tl.load(upper + (last - place), mask=inside & (row <= column), other=0.0)
    on_diagonal = inside & (row == column)
    own = tl.load(gram + row.to(tl.int64) * (stride + 1) + tl.zeros_like(column), mask=on_diagonal, other=1.0)
    tl.store(factor + place, tl.where(on_diagonal & (own == 0.0), tl.load(mark + matrix), value), mask=inside)


def attempt(gram: torch.Tensor, damping: float) -> Factor:
    """Factor each damped Gram matrix once.

    Args:
        gram: `[features, features]` float32, or a batch of them, of which the lower triangle is read.
        damping: share of the mean diagonal added to the diagonal.

    Raises:
        ValueError: another shape or dtype.
    """
    batch, features = gram.shape[:-2], gram.shape[-1]
    check_operand("gram", gram, gram, (*batch, features, features))
    gram = gram if gram.stride(-1) == 1 else gram.contiguous()
    shift = damping * gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    shift, mark = shift.float(), -shift.sqrt().float()
    operand, factor = gram.new_empty(gram.shape), gram.new_empty(gram.shape)
    not_finite = torch.zeros(batch, dtype=torch.int32, device=gram.device)
    tiles, matrices = triton.cdiv(features, TILE), batch.numel()
    strides = gram.stride(-2), gram.stride(0) if batch else 0
    with on_device_of(gram):
        damp_and_reverse[(tiles + 1, triton.cdiv(tiles, 2), matrices)](
            gram, shift, operand, not_finite, features, *strides, TILE=TILE, num_warps=WARPS
        )
        # cuSOLVER takes the rows of `operand` as columns: it reads the stored triangle and copies without transposing.
        upper, failed = torch.linalg.cholesky_ex(operand.mT, upper=True)
        read_backwards[(triton.cdiv(features, ROWS), triton.cdiv(features, COLUMNS), matrices)](
            upper.mT.contiguous(), gram, mark, factor, features, *strides, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return Factor(factor, failed, not_finite)


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device."""
    matrix, number = "*fp32:16", {"features": "i32:16", "stride": "i32:16", "batch_stride": "i32:16"}
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
