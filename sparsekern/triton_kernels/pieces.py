"""A float32 matrix as three matrices of bfloat16, whose products the tensor cores compute exactly.

Floor, on an H200: 10 bytes an element; [4096, 4096] takes 0.04 ms. PyTorch's operators would move 42.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

COLUMNS, WARPS = 1024, 4  # columns and warps of a program


@triton.jit(do_not_specialize=["blocks"])
def split(x, pieces, rows, columns, x_stride, blocks, BELOW: tl.constexpr, RISING: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the pieces of a part of a row, side by side or with `BELOW` one matrix below the other, the largest last with `RISING`."""
    row = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if BELOW:
        place = (row // rows * 3 * rows + row % rows) * columns
        piece = tl.cast(rows, tl.int64) * columns
    else:
        place = row * 3 * columns
        piece = tl.cast(columns, tl.int64)
    high = value.to(tl.bfloat16)
    value -= high.to(tl.float32)
    middle = value.to(tl.bfloat16)
    low = (value - middle.to(tl.float32)).to(tl.bfloat16)
    out = pieces + place + column
    tl.store(out + (2 * piece if RISING else 0), high, mask=inside)
    tl.store(out + piece, middle, mask=inside)
    tl.store(out + (0 if RISING else 2 * piece), low, mask=inside)


def split_in_three(x: torch.Tensor, dim: int, *, rising: bool = False) -> torch.Tensor:
    """Return three matrices of bfloat16 that add up to `x`, one behind the other along `dim`, each smaller than the one before.

    The sum is exact where `x` is 0 or its magnitude at least 2^-110. Elements that are not finite, and those that round to infinity,
    make a piece that is not finite.

    Args:
        x: `[..., rows, columns]` float32. Rows or columns are contiguous; other strides cost a copy.
        dim: -1 or -2.
        rising: put the smallest first.

    Returns:
        The shape of `x`, but three times as long along `dim`, and contiguous as `x` is.
    """
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return split_in_three(x.mT, -3 - dim, rising=rising).mT
    check_operand("x", x, x, tuple(x.shape))
    *batch, rows, columns = x.shape
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, columns)
    below = dim == -2
    pieces = x.new_empty((*batch, 3 * rows, columns) if below else (*batch, rows, 3 * columns), dtype=torch.bfloat16)
    if x.numel():
        blocks = triton.cdiv(columns, COLUMNS)
        with on_device_of(x):
            split[(len(flat) * blocks,)](
                flat, pieces, rows, columns, flat.stride(0), blocks, BELOW=below, RISING=rising, COLUMNS=COLUMNS, num_warps=WARPS
            )
    return pieces


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device: of the left side of a product, and of the right one."""
    numbers = dict.fromkeys(("rows", "columns", "x_stride"), "i32:16") | {"blocks": "i32"}
    for right in (False, True):
        constants = {"BELOW": right, "RISING": right, "COLUMNS": COLUMNS}
        yield CompileCase(split, {"x": "*fp32:16", "pieces": "*bf16:16", **numbers}, constants, WARPS, 3)
