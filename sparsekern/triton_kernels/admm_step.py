"""`admm_step_` in Triton: one elementwise pass before the selection and one after it.

Floor: 26 bytes an element and one launch. Two passes move 44 bytes. Between them `topk_mask` or `nm_mask` selects, so that every pattern
and scope is as fast as those ops. The first pass stores the magnitudes that they rank; the second recomputes `z`. The arguments stay
unchanged until every check has passed. The other half step is a product with an `[in_features, in_features]` matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

BLOCK, WARPS = 2048, 4


class Magnitudes(NamedTuple):
    """The values that the selection ranks.

    Attributes:
        values: `|weight + offset + dual|`, float32.
        suspect: int32 scalar, set if a value is not finite.
    """

    values: torch.Tensor
    suspect: torch.Tensor


@triton.jit
def measure(offset, dual, weight, magnitudes, suspect, count, BLOCK: tl.constexpr):
    """Store `|weight + offset + dual|` of a block; set `suspect` if a value is not finite."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    z = tl.load(weight + place, mask=inside, other=0.0) + tl.load(offset + place, mask=inside, other=0.0)
    size = tl.abs(z + tl.load(dual + place, mask=inside, other=0.0))
    tl.store(magnitudes + place, size, mask=inside)
    tl.store(suspect, 1, mask=tl.min((size < float("inf")).to(tl.int32)) == 0)


@triton.jit
def take_step(offset, dual, mask, weight, kept, changed, count, BLOCK: tl.constexpr):
    """Update `offset`, `dual` and `mask` of a block, and add the number of changed entries of `mask` to `changed`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    w = tl.load(weight + place, mask=inside, other=0.0)
    z = w + tl.load(offset + place, mask=inside, other=0.0)
    z += tl.load(dual + place, mask=inside, other=0.0)
    keep = tl.load(kept + place, mask=inside, other=0) != 0
    before = tl.load(mask + place, mask=inside, other=0) != 0
    tl.store(offset + place, tl.where(keep, z, 0.0 - z) - w, mask=inside)
    tl.store(dual + place, tl.where(keep, 0.0, z), mask=inside)
    tl.store(mask + place, keep.to(tl.uint8), mask=inside)
    tl.atomic_add(changed, tl.sum((keep != before).to(tl.int32)).to(tl.int64))


def magnitudes_of(offset: torch.Tensor, dual: torch.Tensor, weight: torch.Tensor) -> Magnitudes:
    """Return the magnitudes that the selection ranks; all tensors are contiguous float32 of one shape."""
    _check(weight, offset=offset, dual=dual)
    found = Magnitudes(torch.empty_like(weight), weight.new_zeros((), dtype=torch.int32))
    if weight.numel():
        with on_device_of(weight):
            measure[_grid(weight)](offset, dual, weight, *found, weight.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return found


def take_step_(
    offset: torch.Tensor, dual: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Take the step for the selection `kept` and return the number of changed entries of `mask`, int64 on the device.

    All tensors are contiguous and have one shape; `mask` and `kept` are bool, the others float32.
    """
    _check(weight, offset=offset, dual=dual)
    for name, value in (("mask", mask), ("kept", kept)):
        check_operand(name, value, weight, tuple(weight.shape), (torch.bool,))
    changed = weight.new_zeros((), dtype=torch.int64)
    if weight.numel():
        with on_device_of(weight):
            take_step[_grid(weight)](
                offset, dual, mask.view(torch.uint8), weight, kept.contiguous().view(torch.uint8), changed, weight.numel(),
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return changed


def _check(weight: torch.Tensor, **others: torch.Tensor) -> None:
    for name, value in {"weight": weight, **others}.items():
        check_operand(name, value, weight, tuple(weight.shape))


def _grid(weight: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(weight.numel(), BLOCK),)


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device."""
    state = {"offset": "*fp32:16", "dual": "*fp32:16", "weight": "*fp32:16", "count": "i32:16"}
    yield CompileCase(measure, {**state, "magnitudes": "*fp32:16", "suspect": "*i32:16"}, {"BLOCK": BLOCK}, WARPS, 3)
    masks = {"mask": "*u8:16", "kept": "*u8:16", "changed": "*i64:16"}
    yield CompileCase(take_step, {**state, **masks}, {"BLOCK": BLOCK}, WARPS, 3)
