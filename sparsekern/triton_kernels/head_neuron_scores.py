"""`head_neuron_scores` in Triton: the kernel of `feature_norm_` reads the weight, and a small one turns its sums into scores.

Floor, on an H200: the bytes of the weight at 4.3 TB/s; bf16 [4096, 11008] takes 0.02 ms. The columns' energies stay in float64 and are
added in a fixed order: first over the splits of the rows, then over a unit's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

FEATURES, SPLITS, WARPS = 64, 16, 4  # features and splits of a step, warps of a program


class Tile(NamedTuple):
    """The shape of a program.

    Attributes:
        units: units per program.
        width: features of each unit taken at a time.
    """

    units: int
    width: int


def config(head_size: int) -> Tile:
    """Return a tile whose step reads about `FEATURES` neighbouring features, of one head or of several units."""
    width = min(triton.next_power_of_2(head_size), FEATURES)
    return Tile(FEATURES // width, width)


@triton.jit(do_not_specialize=["splits", "weights"])
def score_units(
    sums, sum_squares, scores, splits, units, head_size, weights, split_stride, squares_stride,
    SPLITS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store, for each unit, the mean over its `weights` weights of their squares times the energy of their input feature."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    total = tl.zeros((UNITS, WIDTH), dtype=tl.float64)
    for first in range(0, head_size, WIDTH):
        lane = first + tl.arange(0, WIDTH)
        inside = (unit < units)[:, None] & (lane < head_size)[None, :]
        feature = unit[:, None] * head_size + lane[None, :]
        energy = tl.zeros((SPLITS, UNITS, WIDTH), dtype=tl.float64)
        for begin in range(0, splits, SPLITS):
            split = begin + tl.arange(0, SPLITS)
            place = sums + split.to(tl.int64)[:, None, None] * split_stride + feature[None, :, :]
            energy += tl.load(place, mask=(split < splits)[:, None, None] & inside[None, :, :], other=0.0)
        squares = tl.load(sum_squares + feature.to(tl.int64) * squares_stride, mask=inside, other=0.0)
        total += tl.sum(energy, axis=0) * squares.to(tl.float64)
    score = tl.sum(total, axis=1) / weights.to(tl.float64)
    tl.store(scores + unit, score.to(tl.float32), mask=unit < units)


def score(sum_squares: torch.Tensor, sums: torch.Tensor, rows: int, head_size: int) -> torch.Tensor:
    """Return the scores of all units, `[units]` float32.

    Args:
        sum_squares: `[features]` float32, the energies of the input features.
        sums: `[splits, features]` float64, the sums of squares of the weight's columns over each split of its rows.
        rows: rows of the weight.
        head_size: features of a unit; it divides `features`.

    Raises:
        ValueError: another shape or dtype, or a `head_size` that does not divide `features`.
    """
    splits, features = sums.shape
    check_operand("sum_squares", sum_squares, sums, (features,))
    if head_size < 1 or features % head_size:
        raise ValueError(f"head_size: expected a divisor of {features}, got {head_size}")
    units, tile = features // head_size, config(head_size)
    scores = sum_squares.new_empty(units)
    with on_device_of(sums):
        score_units[(triton.cdiv(units, tile.units),)](
            sums, sum_squares, scores, splits, units, head_size, rows * head_size, sums.stride(0), sum_squares.stride(0),
            SPLITS=SPLITS, UNITS=tile.units, WIDTH=tile.width, num_warps=WARPS,
        )  # fmt: skip
    return scores


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations of neurons and wide heads, the same for every device.

    Heads of other sizes differ only in the shape of a step.
    """
    pointers = {"sums": "*fp64:16", "sum_squares": "*fp32:16", "scores": "*fp32:16"}
    numbers = dict.fromkeys(("splits", "units", "weights"), "i32") | {"split_stride": "i32:16"}
    for head_size in (1, 64):
        numbers_of_head, constants = ({}, {"head_size": 1}) if head_size == 1 else ({"head_size": "i32:16"}, {})
        tile = config(head_size)
        yield CompileCase(
            score_units,
            {**pointers, **numbers, **numbers_of_head},
            {**constants, "squares_stride": 1, "SPLITS": SPLITS, "UNITS": tile.units, "WIDTH": tile.width},
            WARPS,
            3,
        )
