"""Round trips are in test_nm_q4_pack.py; here is what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.layouts.nm_q4 import PATTERNS
from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.ops.nm_linear import sparse_weight
from sparsekern.ops.nm_q4_linear import random_scales
from sparsekern.ops.nm_q4_unpack import reference

from .strategies import PROPERTY, bits

BOTH = pytest.mark.parametrize("unpack", [nm_q4_unpack, reference], ids=["kernel", "reference"])


def blocks_of(rows: int, columns: int, n: int, m: int, generator: torch.Generator) -> torch.Tensor:
    weight = sparse_weight(rows, columns, n, m, torch.float32, generator)
    return nm_q4_pack(weight, random_scales(rows, columns, generator), n, m)


@BOTH
def test_positions_that_do_not_ascend(isa, threads, generator, unpack):
    threads(3)
    blocks = blocks_of(300, 128, 2, 4, generator)
    blocks[37, 1, 1] &= 0xFC  # the second position of row 0 of the strip, quarter 0: row 296, group 16
    blocks[37, 1, 0] |= 0x03
    with pytest.raises(
        ValueError, match=r"^blocks: expected 2 ascending positions in every group, got \[3, 0\] in row 296, group 16$"
    ):
        unpack(blocks, 2, 4, 300, 128)
    wide = blocks_of(16, 64, 4, 16, generator)
    wide[0, 0, 64 + 4 * 2 : 64 + 4 * 2 + 4] = 0x5F  # row 2 of the low half and row 10 of the high half, quarter 1
    with pytest.raises(ValueError, match=r"got \[15, 15, 15, 15\] in row 2, group 1$"):
        unpack(wide, 4, 16, 16, 64)


@BOTH
@pytest.mark.parametrize("number, text", [(0x7C00, "inf"), (0xFC00, "-inf"), (0x7E00, "nan")])
def test_scales_that_are_not_finite(isa, generator, unpack, number, text):
    blocks = blocks_of(21, 128, 2, 4, generator)
    blocks[2, 1, 192 + 6], blocks[2, 1, 192 + 7] = number & 255, number >> 8
    with pytest.raises(ValueError, match=f"^blocks: expected finite scales, got {text} in row 19, block 1$"):
        unpack(blocks, 2, 4, 21, 128)


@BOTH
@pytest.mark.parametrize("n, m", PATTERNS)
def test_what_fills_the_last_blocks_is_zero(isa, generator, unpack, n, m):
    blocks = blocks_of(3, 80, n, m, generator)
    changed = blocks.clone()
    changed[0, 1, 96 if m == 16 else 128] ^= 1  # a value of row 0 in the second quarter, or in the third
    with pytest.raises(ValueError, match="^blocks: expected zeros after the 80 columns, got another value in row 0$"):
        unpack(changed, n, m, 3, 80)
    for place in (-1, 96):  # the scale of the last row, and one of its values
        changed = blocks.clone()
        changed[0, 0, place] ^= 16
        with pytest.raises(ValueError, match="^blocks: expected zeros after the 3 rows$"):
            unpack(changed, n, m, 3, 80)


@PROPERTY
@given(data=st.data(), rows=st.integers(0, 20), groups=st.integers(0, 9), pattern=st.sampled_from(PATTERNS))
def test_damage_is_refused_alike_or_unpacked_alike(isa, data, rows, groups, pattern):
    n, m = pattern
    blocks = blocks_of(rows, groups * m, n, m, torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    raw = blocks.view(-1)
    for _ in range(data.draw(st.integers(0, 3)) if raw.numel() else 0):
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        expected = reference(blocks, n, m, rows, groups * m)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            nm_q4_unpack(blocks, n, m, rows, groups * m)
        assert str(raised.value) == str(error)
    else:
        assert [bits(found) for found in nm_q4_unpack(blocks, n, m, rows, groups * m)] == [bits(found) for found in expected]


def test_arguments_are_refused():
    sound = {
        "blocks": nm_q4_pack(torch.zeros(5, 72), torch.zeros(5, 2).half(), 2, 4),
        "n": 2,
        "m": 4,
        "out_features": 5,
        "in_features": 72,
    }
    nm_q4_unpack(**sound)
    for changed, message in (
        ({"in_features": 70}, "in_features: expected a number divisible by m = 4, got 70"),
        ({"in_features": -4}, "in_features: expected at least 0, got -4"),
        ({"out_features": 9}, r"blocks: expected shape \(2, 2, 208\), got \(1, 2, 208\)"),
        ({"blocks": torch.zeros(1, 2, 208)}, "blocks: expected dtype uint8, got float32"),
        ({"n": 4, "m": 8}, "n, m: expected 2:4, 1:4 or 4:16, which have a layout with 4-bit values, got 4:8"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_q4_unpack(**(sound | changed))
