from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.layouts.nm_q4 import PATTERNS, Q4Layout
from sparsekern.layouts.q4_0 import q4_0_rows
from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.ops.nm_linear import sparse_weight
from sparsekern.ops.nm_q4_linear import random_scales
from sparsekern.ops.nm_q4_pack import reference

from .strategies import FLOATS, PROPERTY, bits, matrices

ALL_PATTERNS = pytest.mark.parametrize("n, m", PATTERNS)


def decoded(blocks: torch.Tensor, n: int, m: int, rows: int, columns: int) -> list[list[float]]:
    """The weight, by the description of the layout, one value at a time."""
    kept, run_rows = 16 * n // m, 32 * m // (16 * n)
    weight = [[0.0] * (blocks.shape[1] * 64) for _ in range(blocks.shape[0] * 2 * run_rows)]
    scales_at = 256 if m == 16 else 192
    for strip, of_strip in enumerate(blocks.tolist()):
        for index, block in enumerate(of_strip):
            scales = torch.tensor(block[scales_at:], dtype=torch.uint8).view(torch.float16).tolist()
            for half in range(2):
                for row in range(run_rows):
                    for quarter in range(4):
                        for k in range(kept):
                            lane = kept * row + k
                            if m == 16:
                                position = block[64 * quarter + lane] >> 4 * half & 15
                                code = block[64 * quarter + 32 + lane] >> 4 * half & 15
                            else:
                                position = block[32 * half + lane] >> 2 * quarter & 3
                                code = block[64 + 64 * (quarter // 2) + 32 * half + lane] >> 4 * (quarter % 2) & 15
                            column = 64 * index + 16 * quarter + k // n * m + position
                            weight[strip * 2 * run_rows + run_rows * half + row][column] = scales[run_rows * half + row] * (
                                code - 8
                            )
    assert all(not any(row[columns:]) for row in weight) and not any(map(any, weight[rows:]))
    return [row[:columns] for row in weight[:rows]]


@ALL_PATTERNS
def test_the_layout_is_what_files_hold(generator, n, m):
    for rows, columns in ((1, 16), (37, 144)):
        weight = sparse_weight(rows, columns, n, m, torch.float32, generator)
        scales = random_scales(rows, columns, generator)
        steps = scales.double().repeat_interleave(64, 1)[:, :columns]
        nearest = (weight.double() / steps).round().clamp(-8, 7) * steps
        blocks = nm_q4_pack(weight, scales, n, m)
        assert decoded(blocks, n, m, rows, columns) == nearest.tolist()
        assert blocks.numel() * 8 == blocks.shape[0] * blocks.shape[1] * Q4Layout(n, m).rows * 64 * (
            n / m * (6 if m == 4 else 8) + 0.25
        )


GOLDEN = {(2, 4): "183f65d577593047", (1, 4): "ee1cf9d937eda8de", (4, 16): "17018a68a1dbe744"}


@ALL_PATTERNS
def test_files_that_are_out_there_stay_readable(n, m):
    numbers = torch.arange(37 * 272).view(37, 272)
    weight = ((numbers * 7919 % 251) - 125) * (numbers * 31 % m < n)
    blocks = nm_q4_pack(weight.float(), (numbers[:, :5] % 17 + 9).half(), n, m)
    assert hashlib.sha256(bits(blocks)).hexdigest()[:16] == GOLDEN[n, m]


@pytest.mark.parametrize("dtype", FLOATS)
@ALL_PATTERNS
def test_a_round_trip_loses_nothing_that_was_rounded_before(isa, poisoned, generator, n, m, dtype):
    weight = sparse_weight(35, 208, n, m, dtype, generator)
    scales = random_scales(35, 208, generator)
    scales[3, 1], scales[4] = -scales[3, 1], 0
    blocks = nm_q4_pack(weight, scales, n, m)
    found, again = nm_q4_unpack(blocks, n, m, 35, 208)
    assert torch.equal(again, scales) and (found[4] == 0).all() and not (found == 0).logical_and(found.signbit()).any()
    assert bits(nm_q4_pack(found, scales, n, m)) == bits(blocks)
    assert bits(nm_q4_pack(found.to(dtype), scales, n, m)) == bits(blocks)  # 8 or more bits still tell 16 values apart


@PROPERTY
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
def test_packs_as_the_reference_or_is_refused_alike(isa, data, pattern):
    n, m = pattern
    weight = data.draw(matrices(columns=st.integers(0, 9).map(lambda groups: groups * m), zeros=st.sampled_from([0.0, 0.5, 0.9])))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scales = torch.tensor([0.0, 1.0, -0.5, 2.0**-24, 3.0, 60000.0]).half()
    scales = scales[torch.randint(6, (len(weight), -(-weight.shape[1] // 64)), generator=seed)]
    try:
        expected = reference(weight, scales, n, m)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            nm_q4_pack(weight, scales, n, m)
        assert str(raised.value) == str(error)
    else:
        assert bits(nm_q4_pack(weight, scales, n, m)) == bits(expected)


@pytest.mark.parametrize("pack", [nm_q4_pack, reference], ids=["kernel", "reference"])
def test_values_that_are_refused(isa, threads, pack):
    threads(3)
    weight, scales = torch.zeros(300, 72), torch.ones(300, 2).half()
    weight[217, 8:11] = torch.tensor([1.0, 3.0, -2.0])
    with pytest.raises(
        ValueError, match="^weight: expected at most 2 non-zeros in every 4 inputs, got 3 in row 217, columns 8 to 11$"
    ):
        pack(weight, scales, 2, 4)
    weight[217, 8] = 0.5  # which rounds to zero
    assert pack(weight, scales, 2, 4).shape == (38, 2, 208)
    weight[5, 70] = math.nan
    with pytest.raises(ValueError, match=r"^weight: expected finite values, got nan at \[5, 70\]"):
        pack(weight, scales, 2, 4)
    scales[299, 1] = -math.inf
    with pytest.raises(ValueError, match=r"^scales: expected finite values, got -inf at \[299, 1\]"):
        pack(torch.zeros(300, 72), scales, 2, 4)


def test_arguments_are_refused():
    sound = {"weight": torch.zeros(5, 72), "scales": torch.zeros(5, 2).half(), "n": 2, "m": 4}
    nm_q4_pack(**sound)
    for changed, message in (
        ({"weight": torch.zeros(5, 70)}, "weight: expected input features divisible by m = 4, got 70"),
        ({"weight": torch.zeros(5, 72).long()}, "weight: expected dtype float32 or bfloat16 or float16, got int64"),
        ({"scales": torch.zeros(5, 2)}, "scales: expected dtype float16, got float32"),
        ({"scales": torch.zeros(5, 1).half()}, r"scales: expected shape \(5, 2\), got \(5, 1\)"),
        ({"n": 3}, "n, m: expected 2:4, 1:4 or 4:16, which have a layout with 4-bit values, got 3:4"),
        ({"m": 4.0}, "m: expected a whole number, got 4.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_q4_pack(**(sound | changed))


def test_gguf_holds_the_same_numbers(generator):
    weight = sparse_weight(6, 192, 2, 4, torch.float32, generator)
    weight, scales = nm_q4_unpack(nm_q4_pack(weight, random_scales(6, 192, generator), 2, 4), 2, 4, 6, 192)
    stored = q4_0_rows(weight, scales)
    assert stored.shape == (6, 6 * 18)
    for row in range(6):
        for block in range(6):
            own = stored[row, 18 * block : 18 * block + 18]
            scale = float(own[:2].clone().view(torch.float16))
            codes = [int(byte) & 15 for byte in own[2:]] + [int(byte) >> 4 for byte in own[2:]]
            assert [scale * (code - 8) for code in codes] == weight[row, 32 * block : 32 * block + 32].tolist()
