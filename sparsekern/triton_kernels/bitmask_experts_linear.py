"""`bitmask_experts_linear` in Triton: tokens times the packed weights of their experts, all experts in one launch.

Floor, on an H200: the packed bytes of the experts that are named, at 4.8 TB/s. One token with 8 experts of [1536, 2048] in 16-bit values
with half of them zero reads 28.3 MB, 5.9 us; the dense weights take 10.5 us. 16 tokens with 8 of 64 experts reach 56 of them, 41 us.
The launches: one for one token; one more, which groups them, for more tokens.

* A program has a tile of 16 rows of one expert, which `find_tile` and `multiply_tile` of `bitmask_linear` expand and multiply; the
  instructions are those of that kernel. One token is multiplied directly, more tokens by the tensor cores.
* A tile of the weight is expanded once for a job of 16 tokens, or of 64 if the experts have 32 tokens each on the average. The weight is
  never stored dense. A job reads 64 rows of `x` from the L2 cache for every 16 rows of the weight: at 5.5 TB/s that is 88 TFLOP/s, so
  that long prompts are bound by the cache.
* Jobs of one expert are neighbours in the launch, so that they find the weight in the L2 cache. All of them store the same `ends`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..layouts.packed_rows import SLACK, TILE_ROWS, lanes, words
from ._common import CompileCase, check_operand, device_of, on_device_of
from ._experts import MANY, check_experts, columns_of, has_job, job_of, jobs_of, width_of
from ._experts import compile_cases as cases_of_grouping
from ._packed_linear import DTYPES, MOST_TOKENS, as_bias, as_matrix, store_product, warps_for
from .bitmask_linear import Weight, constants, find_tile, multiply_tile, packed_types, slots_of

WARPS = (4,)  # most warps of a program; see `warps_for`


@triton.jit(do_not_specialize=["pairs", "choices", "experts", "jobs", "slots"])
def multiply(
    x, ids, places, values, bits, starts, order, ends, status, bias, y,
    pairs, choices, experts, jobs, columns, rows, x_stride, words, slots,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows of one expert by the pairs of one job."""
    job, tile = tl.program_id(0) % jobs, tl.program_id(0) // jobs
    if has_job(places, job):
        expert, known, pair, present = job_of(ids, places, job, pairs, experts, status, WIDTH)
        own = expert * rows
        first, values, bits, ends = find_tile(
            values, bits + own * words, starts + expert * (tl.cdiv(rows, ROWS) + 1), order + own, ends + own * words, status, tile,
            rows, words, slots, LANES, ROWS, WORDS,
        )  # fmt: skip
        x_row = (pair // choices).to(tl.int64) * x_stride
        if WIDTH == 1:
            x += tl.sum(x_row, axis=0)
        sums = multiply_tile(x, values, bits, ends, first, columns, rows, words, x_row, present, WIDTH, PIECES, ROWS, COLUMNS)
        # Reading the job again saves the registers that would hold it.
        expert, known, pair, present = job_of(ids, places, job, pairs, experts, None, WIDTH)
        own = expert * rows
        sums = tl.where(known, sums, float("nan"))
        if bias is not None:
            bias += own
        store_product(sums, y, bias, order + own, first, rows, pair.to(tl.int64) * rows, present, ROWS)


def product(
    x: torch.Tensor, experts: torch.Tensor, weight: Weight, bias: torch.Tensor | None, status: torch.Tensor | None
) -> torch.Tensor:
    """Return the products of each row of `x` with its experts, `[tokens, choices, rows]`; NaN where an id names no expert.

    Args:
        x: `[tokens, columns]`, bfloat16, float16 or float32.
        experts: `[tokens, choices]` int64.
        weight: packed weights in the dtype of `x`, each with a first axis of experts, except the values.
        bias: `[experts, rows]` in the dtype of `x`, or None.
        status: int32 scalar, set if the packed tensors contradict each other or an id names no expert; None skips the check.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_experts(x, experts, len(weight.order))
    count, rows = _check(weight, x)
    x, bias = as_matrix(x), as_bias(bias, (count, rows), x)
    tokens, columns = x.shape
    choices = experts.shape[1]
    y = x.new_empty((tokens, choices, rows))
    if y.numel():
        tiles = triton.cdiv(rows, TILE_ROWS)
        width = width_of(experts, count, x.dtype)
        hit = tiles * min(experts.numel(), count)  # tiles that are multiplied at the same time
        warps = warps_for(hit, columns, WARPS, device_of(x).multiprocessors)
        ends = weight.order.new_empty(weight.bitmask.shape)
        with on_device_of(x):
            jobs = jobs_of(experts, count, width)
            multiply[(tiles * jobs.most,)](
                x, jobs.ids, jobs.places, *weight, ends, status, bias, y,
                len(jobs.ids), choices, count, jobs.most, columns, rows, x.stride(0), words(columns), slots_of(weight),
                **_constants(x.dtype, width, warps), num_warps=warps, num_stages=1,
            )  # fmt: skip
    return y


def _check(weight: Weight, x: torch.Tensor) -> tuple[int, int]:
    """Return the numbers of experts and rows; raise if a packed tensor is smaller than the kernel assumes, whatever it holds."""
    count, rows = weight.order.shape
    held = len(weight.values)
    least = max(held - held % lanes(x.dtype), SLACK * lanes(x.dtype))
    check_operand("values", weight.values, x, (least,), (x.dtype,))
    check_operand("bitmask", weight.bitmask, x, (count, rows, words(x.shape[-1])), (torch.int64,))
    check_operand("starts", weight.starts, x, (count, triton.cdiv(rows, TILE_ROWS) + 1), (torch.int64,))
    check_operand("order", weight.order, x, (count, rows), (torch.int32,))
    return count, rows


def _constants(dtype: torch.dtype, width: int, warps: int) -> dict[str, int]:
    return {**constants(dtype, warps), "WIDTH": width, "COLUMNS": columns_of(width)}


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the configurations that need the most registers, the same for every device."""
    yield from cases_of_grouping()
    (warps,) = WARPS
    for dtype, width in (
        (torch.bfloat16, 1),
        (torch.float16, 1),
        (torch.bfloat16, MOST_TOKENS),
        (torch.float32, MOST_TOKENS),
        (torch.bfloat16, MANY),
    ):
        own = f"*{DTYPES[dtype]}:16"
        pointers = {"x": own, "ids": "*i64:16", **packed_types(dtype), "bias": own, "y": own}
        places = {"places": "*i32:16"} if width > 1 else {}
        numbers = dict.fromkeys(("pairs", "choices", "experts", "jobs"), "i32") | {"slots": "i64"}
        numbers |= dict.fromkeys(("columns", "rows", "x_stride", "words"), "i32:16")
        absent = {"status": None} if places else {"status": None, "places": None}
        yield CompileCase(multiply, {**pointers, **places, **numbers}, {**absent, **_constants(dtype, width, warps)}, warps, 1)
