from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_pack import reference
from sparsekern.ops.bitmask_unpack import reference as unpack_reference

from .strategies import FLOATS, PROPERTY, bits, matrices, with_nan


@PROPERTY
@given(weight=matrices(columns=st.integers(0, 200), zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0])))
def test_is_values_and_little_endian_bits_and_comes_back(isa, weight):
    flags = weight != 0
    expected_bits = numpy.packbits(flags.cpu().numpy(), axis=1, bitorder="little")
    restored = torch.where(flags, weight, torch.zeros_like(weight))  # the one thing lost is the sign of a zero
    for pack, unpack in ((bitmask_pack, bitmask_unpack), (reference, unpack_reference)):
        values, bitmask = pack(weight)
        assert bits(values) == bits(weight[flags])
        assert bitmask.dtype is torch.uint8 and numpy.array_equal(bitmask.cpu().numpy(), expected_bits)
        assert bits(unpack(values, bitmask, weight.shape[1])) == bits(restored)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, columns", [(301, 523), (41, 640)])
def test_many_rows(isa, threads, generator, dtype, rows, columns):
    threads(3)
    weight = torch.randn(rows, columns, generator=generator).clamp_min(0).to(dtype)
    weight[rows // 4 : rows // 2] = 0
    weight[rows // 2 :, ::2] = 1
    for got, want in zip(bitmask_pack(weight), reference(weight), strict=True):
        assert bits(got) == bits(want)
    assert bits(bitmask_unpack(*bitmask_pack(weight), columns)) == bits(weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_that_begin_inside_a_vector_of_memory(isa, generator, dtype):
    weight = torch.randn(1 + 41 * 640, generator=generator).clamp_min(0).to(dtype)[1:].view(41, 640)
    values, bitmask = bitmask_pack(weight)
    assert bits(values) == bits(reference(weight)[0])
    values, bitmask = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (values, bitmask))
    assert all(t.is_contiguous() and t.data_ptr() % 16 != 0 for t in (weight, values, bitmask))
    assert bits(bitmask_unpack(values, bitmask, 640)) == bits(weight)


def test_compiles_where_the_size_depends_on_the_data(generator):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):

        @torch.compile(fullgraph=True, backend="aot_eager")
        def double(weight):
            values, bitmask = bitmask_pack(weight)
            return bitmask_unpack(2 * values, bitmask, weight.shape[1])

        weight = torch.randn(7, 30, generator=generator).clamp_min(0)
        assert torch.equal(double(weight), 2 * weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_nan_is_named(isa, dtype):
    weight = with_nan(torch.ones(300, 70, dtype=dtype), (299, 0), (217, 69), (217, 65), (218, 1))
    for pack in (bitmask_pack, reference):
        with pytest.raises(ValueError, match=r"^weight: expected no NaN, got nan at \[217, 65\]"):
            pack(weight)


def test_dtype_and_dimensions_are_refused():
    with pytest.raises(TypeError, match="weight: expected dtype .* got int8"):
        bitmask_pack(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(3,\)"):
        bitmask_pack(torch.zeros(3))
