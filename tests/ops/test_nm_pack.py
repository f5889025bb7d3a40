from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from sparsekern.ops import nm_linear, nm_pack, nm_unpack
from sparsekern.ops.nm_pack import reference
from sparsekern.ops.nm_unpack import reference as unpack_reference

from .strategies import FLOATS, PROPERTY, bits, matrices, misaligned, with_nan

PATTERNS = [(2, 4), (1, 2), (1, 4), (3, 4), (3, 7), (4, 8), (2, 5), (1, 16), (15, 16)]
NAMES = ("values", "codes")


def assert_packed_as_reference(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
    packed = nm_pack(weight, n, m)
    assert tuple(packed) == NAMES
    for name, expected in zip(NAMES, reference(weight, n, m), strict=True):
        got = packed[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous(), name
        assert bits(got) == bits(expected), name
    return packed


def keep_at_most(weight: torch.Tensor, n: int, m: int, generator: torch.Generator) -> torch.Tensor:
    """Return the weight with N random entries of each group of M kept, and zeros of either sign instead of the others."""
    groups = weight.unflatten(1, (weight.shape[1] // m, m))
    kept = torch.rand(groups.shape, generator=generator).argsort(-1).argsort(-1) < n
    zeros = torch.tensor([0.0, -0.0])[torch.randint(2, groups.shape, generator=generator)].to(weight.dtype)
    return torch.where(kept, groups, zeros).flatten(1)


@PROPERTY
@given(
    weight=matrices(rows=st.integers(0, 20), columns=st.integers(0, 40), zeros=st.sampled_from([0.0, 0.5, 1.0])),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**32),
)
def test_kernel_and_reference_pack_alike_and_it_comes_back(isa, weight, pattern, seed):
    n, m = pattern
    weight = keep_at_most(weight.repeat_interleave(m, dim=1), n, m, torch.Generator().manual_seed(seed))
    packed = assert_packed_as_reference(weight, n, m)
    restored = torch.where(weight != 0, weight, torch.zeros_like(weight))  # the one thing lost is the sign of a zero
    for unpack in (nm_unpack, unpack_reference):
        assert bits(unpack(**packed, n=n, m=m, features=weight.shape[1])) == bits(restored)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_many_rows_and_columns(isa, threads, poisoned, generator, n, m, dtype):
    threads(3)
    weight = keep_at_most(torch.randn(301, 67 * m, generator=generator).to(dtype), n, m, generator)
    packed = assert_packed_as_reference(weight, n, m)
    assert torch.equal(nm_unpack(**packed, n=n, m=m, features=67 * m), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (3, 7)])
def test_tensors_that_begin_inside_a_vector_of_memory(isa, generator, n, m, dtype):
    weight = misaligned(keep_at_most(torch.randn(41, 40 * m, generator=generator).to(dtype), n, m, generator))
    packed = {name: misaligned(tensor) for name, tensor in assert_packed_as_reference(weight, n, m).items()}
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 != 0 for tensor in (weight, *packed.values()))
    assert torch.equal(nm_unpack(**packed, n=n, m=m, features=40 * m), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (3, 7)])
def test_nan_is_kept_with_its_bits(isa, n, m, dtype):
    weight = with_nan(torch.zeros(20, 10 * m, dtype=dtype), (19, 0), (7, 10 * m - 1))
    weight.view(torch.int32 if dtype is torch.float32 else torch.int16)[3, 3] = -1  # a NaN with a payload and a sign
    packed = assert_packed_as_reference(weight, n, m)
    assert bits(nm_unpack(**packed, n=n, m=m, features=10 * m)) == bits(weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (3, 7)])
def test_the_product_takes_what_packing_makes(isa, generator, n, m, dtype):
    weight = keep_at_most(torch.randn(37, 30 * m, generator=generator).to(dtype), n, m, generator)
    x, bias = torch.randn(3, 30 * m, generator=generator).to(dtype), torch.randn(37, generator=generator).to(dtype)
    expected = linear(x.double(), weight.double(), bias.double())
    y = nm_linear(x, **nm_pack(weight, n, m), n=n, m=m, bias=bias)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_the_first_group_that_does_not_fit_is_named(isa, threads, n, m, dtype):
    threads(3)
    weight = torch.zeros(300, 20 * m, dtype=dtype)
    weight[299, : n + 1] = 1
    weight[217, 12 * m : 13 * m] = -1
    weight[217, 19 * m :] = torch.inf
    place = f"got {m} in row 217, columns {12 * m} to {13 * m - 1}"
    for pack in (nm_pack, reference):
        with pytest.raises(ValueError, match=f"^weight: expected at most {n} non-zeros in every {m} inputs, {place}"):
            pack(weight, n, m)


def test_arguments_are_refused():
    weight = torch.zeros(4, 12)
    for wrong, message in (
        ((weight.to(torch.int8), 2, 4), "weight: expected dtype .* got int8"),
        ((weight[0], 2, 4), r"weight: expected 2 dimensions, got shape \(12,\)"),
        ((weight[:, :10], 2, 4), "weight: expected input features divisible by m = 4, got 10"),
        ((weight, 4, 4), r"n, m: expected n < m <= 16 .*, got 4:4"),
        ((weight, 2, 24), r"n, m: expected n < m <= 16 .*, got 2:24"),
        ((weight, 0, 4), "n: expected at least 1, got 0"),
        ((weight, 2.0, 4), "n: expected a whole number, got 2.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_pack(*wrong)
