from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from sparsekern.ops import bitmask_linear, bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_pack import reference
from sparsekern.ops.bitmask_unpack import reference as unpack_reference

from .strategies import FLOATS, PROPERTY, bits, matrices, misaligned, with_nan

NAMES = ("values", "bitmask", "starts", "order")


def assert_packed_as_reference(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed = bitmask_pack(weight)
    assert tuple(packed) == NAMES
    for name, expected in zip(NAMES, reference(weight), strict=True):
        got = packed[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous(), name
        assert bits(got) == bits(expected), name
    return packed


@PROPERTY
@given(weight=matrices(rows=st.integers(0, 40), columns=st.integers(0, 200), zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0])))
def test_kernel_and_reference_pack_alike_and_it_comes_back(isa, weight):
    packed = assert_packed_as_reference(weight)
    restored = torch.where(weight != 0, weight, torch.zeros_like(weight))  # the one thing lost is the sign of a zero
    for unpack in (bitmask_unpack, unpack_reference):
        assert bits(unpack(**packed, features=weight.shape[1])) == bits(restored)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, columns", [(301, 523), (41, 640), (3, 9000)])
def test_many_rows_and_columns(isa, threads, poisoned, generator, dtype, rows, columns):
    threads(3)
    weight = torch.randn(rows, columns, generator=generator).clamp_min(0).to(dtype)
    weight[rows // 4 : rows // 2] = 0
    weight[rows // 2 :, ::2] = 1
    packed = assert_packed_as_reference(weight)
    assert bits(bitmask_unpack(**packed, features=columns)) == bits(weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_with_as_many_values_keep_their_order(isa, dtype):
    weight = torch.ones(70, 9, dtype=dtype).tril()
    packed = assert_packed_as_reference(weight.repeat(3, 1))
    assert packed["order"][:3].tolist() == [0, 70, 140]


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_that_begin_inside_a_vector_of_memory(isa, generator, dtype):
    weight = misaligned(torch.randn(41, 640, generator=generator).clamp_min(0).to(dtype))
    packed = {name: misaligned(tensor) for name, tensor in assert_packed_as_reference(weight).items()}
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 != 0 for tensor in (weight, *packed.values()))
    assert bits(bitmask_unpack(**packed, features=640)) == bits(weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_kept_with_its_bits(isa, dtype):
    weight = with_nan(torch.ones(20, 70, dtype=dtype), (19, 0), (7, 69))
    whole = weight.view(torch.int32 if dtype is torch.float32 else torch.int16)
    whole[3, 3] = -1  # a NaN with a payload and a sign
    packed = assert_packed_as_reference(weight)
    assert bits(bitmask_unpack(**packed, features=70)) == bits(weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_product_takes_what_packing_makes(isa, generator, dtype):
    weight = torch.randn(37, 130, generator=generator).clamp_min(0).to(dtype)
    x, bias = torch.randn(3, 130, generator=generator).to(dtype), torch.randn(37, generator=generator).to(dtype)
    expected = linear(x.double(), weight.double(), bias.double())
    y = bitmask_linear(x, **bitmask_pack(weight), bias=bias)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_compiles_where_the_size_depends_on_the_data(generator):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):

        @torch.compile(fullgraph=True, backend="aot_eager")
        def double(weight):
            packed = bitmask_pack(weight)
            packed["values"] = 2 * packed["values"]
            return bitmask_unpack(**packed, features=weight.shape[1])

        weight = torch.randn(7, 30, generator=generator).clamp_min(0)
        assert torch.equal(double(weight), 2 * weight)


def test_dtype_and_dimensions_are_refused():
    with pytest.raises(TypeError, match="weight: expected dtype .* got int8"):
        bitmask_pack(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(3,\)"):
        bitmask_pack(torch.zeros(3))
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        bitmask_pack([[1.0, 0.0]])
