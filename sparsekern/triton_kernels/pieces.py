"""A float32 matrix as two matrices of TF32 values, whose products the tensor cores compute exactly.

Floor, on an H200: 12 bytes an element; [4096, 4096] takes 0.05 ms. PyTorch's operators would move 44.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

COLUMNS, WARPS = 1024, 4  # columns and warps of a program


@triton.jit
def to_tf32(x):
    """Round to the nearest number of eleven significant bits, and ties away from zero. A NaN stays one, whatever its bits."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit(do_not_specialize=["blocks"])
def split(x, high, low, columns, x_stride, blocks, COLUMNS: tl.constexpr):
    """Store the pieces of a part of a row."""
    row = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    first = to_tf32(value)
    tl.store(high + row * columns + column, first, mask=inside)
    tl.store(low + row * columns + column, to_tf32(value - first), mask=inside)


def split_in_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices of TF32 values that add up to `x`, each element to within 2^-22 of itself.

    Elements that are not finite, and those that round to infinity, make a piece that is not finite.

    Args:
        x: `[..., rows, columns]` float32. Rows or columns are contiguous; other strides cost a copy.

    Returns:
        `(high, low)`, of the shape of `x` and contiguous as it is.
    """
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        high, low = split_in_two(x.mT)
        return high.mT, low.mT
    check_operand("x", x, x, tuple(x.shape))
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])
    high, low = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    if x.numel():
        columns, blocks = x.shape[-1], triton.cdiv(x.shape[-1], COLUMNS)
        with on_device_of(x):
            split[(len(rows) * blocks,)](rows, high, low, columns, rows.stride(0), blocks, COLUMNS=COLUMNS, num_warps=WARPS)
    return high, low


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configuration, the same for every device."""
    pointers = dict.fromkeys(("x", "high", "low"), "*fp32:16")
    numbers = {"columns": "i32:16", "x_stride": "i32:16", "blocks": "i32"}
    yield CompileCase(split, {**pointers, **numbers}, {"COLUMNS": COLUMNS}, WARPS, 3)
