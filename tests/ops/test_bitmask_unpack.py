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


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("change", [-1, 1, -40])
def test_not_as_many_values_as_bits(isa, unpack, dtype, change):
    values, bitmask = bitmask_pack(torch.ones(5, 13, dtype=dtype))
    wrong = torch.ones(65 + change, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^values: expected as many as bits are set in bitmask \(65\), got {65 + change}"):
        unpack(wrong, bitmask, 13)


@BOTH
@pytest.mark.parametrize("change", [-1, 1])
def test_one_value_more_or_less_than_many_bits(isa, unpack, change):
    values, bitmask = bitmask_pack(torch.ones(31, 640))
    wrong = torch.ones(31 * 640 + change)
    with pytest.raises(ValueError, match=rf"^values: expected as many as bits are set in bitmask \(19840\), got {19840 + change}"):
        unpack(wrong, bitmask, 640)


@BOTH
def test_a_set_bit_past_the_last_column(isa, unpack):
    values, bitmask = bitmask_pack(torch.ones(5, 13))
    bitmask[3, 1] |= 0b0010_0000
    bitmask[4, 1] |= 0b1000_0000
    with pytest.raises(ValueError, match="^bitmask: expected zeros past column 12, got a set bit in row 3"):
        unpack(torch.ones(67), bitmask, 13)


@PROPERTY
@given(data=st.data(), rows=st.integers(0, 4), features=st.integers(0, 130), count=st.integers(0, 300))
def test_noise_is_unpacked_or_refused(isa, data, rows, features, count):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    noise = torch.randint(256, (rows, (features + 7) // 8), dtype=torch.uint8, generator=generator)
    values = torch.randn(count, generator=generator)
    try:
        expected = reference(values, noise, features)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            bitmask_unpack(values, noise, features)
        assert str(raised.value) == str(error)
    else:
        assert bits(bitmask_unpack(values, noise, features)) == bits(expected)


def test_arguments_are_refused():
    values, bitmask = bitmask_pack(torch.ones(5, 13))
    with pytest.raises(ValueError, match=r"bitmask: expected shape \('any', 3\), got \(5, 2\)"):
        bitmask_unpack(values, bitmask, 17)
    with pytest.raises(ValueError, match="features: expected at least 0, got -1"):
        bitmask_unpack(values, bitmask, -1)
    with pytest.raises(TypeError, match="features: expected a whole number, got 13.0"):
        bitmask_unpack(values, bitmask, 13.0)
    with pytest.raises(TypeError, match="bitmask: expected dtype uint8, got bool"):
        bitmask_unpack(values, bitmask.bool(), 13)
    with pytest.raises(ValueError, match=r"values: expected 1 dimensions, got shape \(5, 13\)"):
        bitmask_unpack(values.view(5, 13), bitmask, 13)
