"""Round trips are in test_nm_pack.py; here is what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import nm_pack, nm_unpack
from sparsekern.ops.nm_unpack import reference

from .strategies import FLOATS, PROPERTY, bits
from .test_nm_pack import PATTERNS, keep_at_most

BOTH = pytest.mark.parametrize("unpack", [nm_unpack, reference], ids=["kernel", "reference"])


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
def test_positions_that_do_not_ascend(isa, threads, unpack, dtype):
    threads(3)
    packed = nm_pack(torch.ones(300, 80, dtype=dtype) * (torch.arange(80) % 4 < 2), 2, 4)
    packed["codes"][299, 0] = 0
    packed["codes"][217, 1] = 0b0100_0001_0000_0100  # groups 8 to 11: positions (0, 1), (0, 0), (1, 0), (0, 1)
    message = r"^codes: expected 2 ascending positions below 4 in every group, got \[0, 0\] in row 217, group 9"
    with pytest.raises(ValueError, match=message):
        unpack(**packed, n=2, m=4, features=80)


@BOTH
@pytest.mark.parametrize("n, m, wrong", [(1, 3, 3), (2, 5, 15), (3, 7, 7)])
def test_positions_past_the_group(isa, unpack, n, m, wrong):
    packed = nm_pack(torch.ones(3, 4 * m) * (torch.arange(4 * m) % m < n), n, m)
    bits_each = 2 if m <= 4 else 4
    packed["codes"][2, 0] |= wrong << bits_each * (n - 1)
    with pytest.raises(ValueError, match=rf"^codes: expected {n} ascending positions below {m} .*{wrong}\] in row 2, group 0"):
        unpack(**packed, n=n, m=m, features=4 * m)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (3, 7)])
def test_something_after_the_last_value(isa, unpack, n, m, dtype):
    packed = nm_pack(torch.zeros(3, 4 * m, dtype=dtype), n, m)
    for value in (torch.nan, 1e-7, -1.0):
        values = packed["values"].clone()
        values[2, -1] = value
        with pytest.raises(ValueError, match=f"^values: expected zeros after the {4 * n} values of a row"):
            unpack(values, packed["codes"], n, m, 4 * m)
    packed["codes"][1, -1] = -(2**31)
    with pytest.raises(ValueError, match=f"^codes: expected zeros after the {4 * n} positions of a row"):
        unpack(**packed, n=n, m=m, features=4 * m)


@PROPERTY
@given(
    data=st.data(),
    rows=st.integers(0, 20),
    groups=st.integers(0, 30),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(FLOATS),
)
def test_damage_is_refused_alike_or_unpacked_alike(isa, data, rows, groups, pattern, dtype):
    n, m = pattern
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    packed = nm_pack(keep_at_most(torch.randn(rows, groups * m, generator=generator).to(dtype), n, m, generator), n, m)
    raw = packed[data.draw(st.sampled_from(sorted(packed)))].view(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(0, 2)) if raw.numel() else 0):
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    arguments = packed | {"n": n, "m": m, "features": groups * m}
    try:
        expected = reference(**arguments)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            nm_unpack(**arguments)
        assert str(raised.value) == str(error)
    else:
        assert bits(nm_unpack(**arguments)) == bits(expected)


def test_arguments_are_refused():
    packed = nm_pack(torch.zeros(5, 72), 2, 4) | {"n": 2, "m": 4, "features": 72}
    for changed, message in (
        ({"features": 70}, "features: expected a number divisible by m = 4, got 70"),
        ({"features": -4}, "features: expected at least 0, got -4"),
        ({"features": 8}, r"values: expected shape \('any', 16\), got \(5, 48\)"),
        ({"codes": packed["codes"].long()}, "codes: expected dtype int32, got int64"),
        ({"codes": packed["codes"][:, 1:]}, r"codes: expected shape \(5, 3\), got \(5, 2\)"),
        ({"values": packed["values"].double()}, "values: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"m": 17}, "n, m: expected n < m <= 16"),
        ({"n": 0}, "n: expected at least 1, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_unpack(**(packed | changed))
