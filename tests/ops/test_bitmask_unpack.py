"""Round trips are in test_bitmask_pack.py; here is what is refused, before any value is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_unpack import reference

from .strategies import FLOATS, PROPERTY, bits

BOTH = pytest.mark.parametrize("unpack", [bitmask_unpack, reference], ids=["kernel", "reference"])


def packed_ones(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return bitmask_pack(torch.ones(rows, columns, dtype=dtype))


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("change", [-2, 2, 64])
def test_not_as_many_values_as_bits(isa, unpack, dtype, change):
    packed = packed_ones(5, 13, dtype)
    expected = packed["values"].numel()
    packed["values"] = torch.ones(expected + change, dtype=dtype)
    with pytest.raises(ValueError, match="^values: expected "):
        unpack(**packed, features=13)
    if change > 0:
        message = f"^values: expected {expected} values for the bits set in bitmask, got {expected + change}"
        with pytest.raises(ValueError, match=message):
            unpack(**packed, features=13)


@BOTH
def test_a_bit_more_or_less_than_values(isa, unpack):
    packed = packed_ones(31, 640)
    for flip in (1, -(2**63)):
        packed["bitmask"][7, 3] ^= flip
        with pytest.raises(ValueError, match=r"^values: expected 19903 values for the bits set in bitmask, got 19904"):
            unpack(**packed, features=640)
        packed["bitmask"][7, 3] ^= flip
    assert unpack(**packed, features=640).all()


@BOTH
def test_a_set_bit_past_the_last_column(isa, unpack):
    packed = packed_ones(5, 77)
    packed["bitmask"][3, 1] |= 1 << 13
    packed["bitmask"][4, 1] |= 1 << 60
    with pytest.raises(ValueError, match="^bitmask: expected zeros past column 76, got a set bit in row 3"):
        unpack(**packed, features=77)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile, wrong", [(0, 1), (1, -1), (2, 2**62), (3, 0)])
def test_starts_that_are_not_those_of_the_bits(isa, unpack, dtype, tile, wrong):
    packed = packed_ones(40, 30, dtype)
    packed["starts"][tile] = wrong
    with pytest.raises(
        ValueError, match=f"^starts: expected the first slot after the values of earlier tiles, got {wrong} for tile {tile}"
    ):
        unpack(**packed, features=30)


@BOTH
@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1, 3])
def test_order_that_is_no_permutation(isa, unpack, wrong):
    packed = packed_ones(40, 30)
    packed["order"][7] = wrong
    with pytest.raises(ValueError, match="^order: expected each row from 0 to 39 once"):
        unpack(**packed, features=30)


@PROPERTY
@given(data=st.data(), rows=st.integers(0, 40), features=st.integers(0, 130), dtype=st.sampled_from(FLOATS))
def test_damage_is_refused_alike_or_unpacked_alike(isa, data, rows, features, dtype):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    packed = bitmask_pack(torch.randn(rows, features, generator=generator).clamp_min(0).to(dtype))
    name = data.draw(st.sampled_from(sorted(packed)))
    raw = packed[name].view(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(0, 2)) if raw.numel() else 0):
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        expected = reference(**packed, features=features)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            bitmask_unpack(**packed, features=features)
        assert str(raised.value) == str(error)
    else:
        assert bits(bitmask_unpack(**packed, features=features)) == bits(expected)


def test_arguments_are_refused():
    packed = packed_ones(5, 77)
    for changed, message in (
        ({"features": 13}, r"bitmask: expected shape \(5, 1\), got \(5, 2\)"),
        ({"features": -1}, "features: expected at least 0, got -1"),
        ({"features": 77.0}, "features: expected a whole number, got 77.0"),
        ({"bitmask": packed["bitmask"].int()}, "bitmask: expected dtype int64, got int32"),
        ({"values": packed["values"].double()}, "values: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"values": packed["values"][None]}, r"values: expected 1 dimensions, got shape"),
        ({"starts": packed["starts"][1:]}, r"starts: expected shape \(2,\), got \(1,\)"),
        ({"order": packed["order"].long()}, "order: expected dtype int32, got int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bitmask_unpack(**(packed | {"features": 77} | changed))
