"""`sensitivity_` in Triton: cuBLAS computes the layer's outputs a tile at a time; each tile adds `|W| * (|Y|^T |X|)` to `importance`.

Floor, on an H200: `4 * tokens * out_features * in_features` operations at 790 TFLOP/s, half of them in cuBLAS. A batch of [16384, 4096]
through a [4096, 4096] weight takes 1.4 ms. Memory traffic beside it, at 4.3 TB/s:

* A tile of outputs is written and read once, 4 bytes an output in bf16: 0.06 ms. The second product takes absolute values in registers
  (`_product.py`), so they are never in memory.
* `importance` is read and written, and the weight read, once per tile of outputs, at the end of that product: 0.04 ms.
* `x` is read once more and its absolute values are written, 0.06 ms: wgmma takes its second operand only from shared memory, unchanged.
  The same pass looks for NaN and Inf, for which `x` must be read anyway, and zeros the masked rows.

An overflowing output shows in the sums that it spoils, at no cost. If a kernel finds NaN or Inf in the weight or in `x`, all later kernels
leave `importance` unchanged. The host therefore waits for the device only once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _product
from ._common import CompileCase, aligned_width, check_operand, on_device_of

ROWS, COLUMNS, WARPS = 16, 256, 4  # tile and warps of a program of `take_sizes`
OUTPUT_BYTES = 2**28  # limit for a tile of outputs
OUTPUT_ROWS = 16384  # most rows of the weight in a tile of outputs
DTYPES = (torch.bfloat16, torch.float32)  # float16 differs from bfloat16 only in the type


class Outputs(NamedTuple):
    """A tile of the layer's outputs.

    Attributes:
        tokens: its tokens, `x[tokens]`.
        rows: its rows of the weight, `weight[rows]`.
        values: the outputs, `[tokens, rows]`.
    """

    tokens: slice
    rows: slice
    values: torch.Tensor


class Tile(NamedTuple):
    """The shape of a tile of outputs."""

    tokens: int
    rows: int


def config(tokens: int, rows: int, dtype: torch.dtype) -> Tile:
    """Return the largest tile of outputs within the limits, so that `importance` is read rarely, in tiles of about equal size."""
    rows = _even_part(rows, OUTPUT_ROWS, 128)
    return Tile(_even_part(tokens, OUTPUT_BYTES // (rows * dtype.itemsize), 64), rows)


def _even_part(whole: int, most: int, step: int) -> int:
    """Return the size of a part, a multiple of `step`, if `whole` is split into as few equal parts of at most `most` as possible."""
    parts = triton.cdiv(whole, most // step * step)
    return triton.cdiv(triton.cdiv(whole, parts), step) * step


@triton.jit
def take_sizes(
    x, row_mask, sizes, status, rows, columns, width, x_stride, sizes_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Store `|x|` in `sizes`, if given, with zeros in masked rows; set `status` if an unmasked row has a NaN or Inf."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = row < rows
    if row_mask is not None:
        used &= tl.load(row_mask + row, mask=used, other=0) != 0
    place = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    value = tl.abs(tl.load(place, mask=used[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32))
    if status is not None:
        tl.store(status, 1, mask=tl.min((value < float("inf")).to(tl.int32)) == 0)
    if sizes is not None:
        place = sizes + row.to(tl.int64)[:, None] * sizes_stride + column[None, :]
        tl.store(place, value.to(sizes.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


def add_(
    importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None, checked: bool
) -> torch.Tensor | None:
    """Run the op `sensitivity_` and return its status, two int32 on the device, or None.

    The first is set if `weight` or an unmasked row of `x` has a NaN or Inf; `importance` is then unchanged. The second is set if a sum
    is not finite: an output overflowed, which is an error, or the sum of finite outputs did, which is none.

    Args:
        importance: `[out_features, in_features]` float32, updated in place.
        weight: `[out_features, in_features]` in the dtype of `x`.
        x: `[tokens, in_features]`, bfloat16, float16 or float32.
        row_mask: `[tokens]` bool, the tokens to include; None includes all.
        checked: look for NaN and Inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    (rows, features), tokens = importance.shape, len(x)
    check_operand("x", x, importance, (tokens, features), _product.DTYPES)
    check_operand("weight", weight, importance, (rows, features), (x.dtype,))
    check_operand("importance", importance, importance, (rows, features))
    if row_mask is not None:
        check_operand("row_mask", row_mask, x, (tokens,), (torch.bool,))
        row_mask = row_mask.contiguous()
    weight, x = (matrix.detach() if matrix.stride(1) == 1 else matrix.detach().contiguous() for matrix in (weight, x))
    status = x.new_zeros(2, dtype=torch.int32) if checked else None
    width = aligned_width(features)
    sizes = x.new_empty((tokens, width))
    with on_device_of(x):
        _launch(x, row_mask, sizes, status)
        if checked:
            _launch(weight, None, None, status)
    for part in outputs_of(weight, x):
        mask = None if row_mask is None else row_mask[part.tokens]
        weighed = _product.Weighed(weight[part.rows], status)
        _product.add_product_over_rows(
            importance[part.rows], part.values, sizes[part.tokens, :features], row_mask=mask, weighed=weighed
        )
    return status


def outputs_of(weight: torch.Tensor, x: torch.Tensor) -> Iterator[Outputs]:
    """Yield the layer's outputs a tile at a time, rounded to the dtype of `x` as the layer rounds them; all tiles share memory."""
    if not (x.numel() and len(weight)):
        return
    tile = config(len(x), len(weight), x.dtype)
    memory = x.new_empty((min(tile.tokens, len(x)), tile.rows))  # its rows begin at multiples of 16 bytes
    for token in range(0, len(x), tile.tokens):
        for row in range(0, len(weight), tile.rows):
            tokens, rows = slice(token, token + tile.tokens), slice(row, row + tile.rows)
            inputs, part = x[tokens], weight[rows]
            yield Outputs(tokens, rows, torch.mm(inputs, part.T, out=memory[: len(inputs), : len(part)]))


def _launch(x: torch.Tensor, row_mask: torch.Tensor | None, sizes: torch.Tensor | None, status: torch.Tensor | None) -> None:
    rows, columns = x.shape
    width = columns if sizes is None else sizes.shape[1]
    sizes_stride = 0 if sizes is None else sizes.stride(0)
    take_sizes[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
        x, row_mask, sizes, status, rows, columns, width, x.stride(0), sizes_stride, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations for devices of `capability`."""
    for dtype in DTYPES:
        name = _product.DTYPES[dtype]
        pointers = {"x": f"*{name}:16", "row_mask": "*i1:16", "sizes": f"*{name}:16", "status": "*i32:16"}
        numbers = dict.fromkeys(("columns", "width", "x_stride", "sizes_stride"), "i32:16")
        yield CompileCase(take_sizes, {**pointers, "rows": "i32", **numbers}, {"ROWS": ROWS, "COLUMNS": COLUMNS}, WARPS, 3)
    yield from _product.weighed_compile_cases(capability, DTYPES)
