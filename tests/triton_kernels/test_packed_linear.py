"""What is particular to the Triton kernels of `bitmask_linear` and `nm_linear`; their results are tested beside the ops."""

from __future__ import annotations

import pytest
import torch

from sparsekern import backends
from sparsekern.backends import bitmask_linear as bitmask_table
from sparsekern.layouts.packed_rows import SLACK, pack_bitmask_rows, pack_nm_rows
from sparsekern.ops import bitmask_linear
from sparsekern.triton_kernels import bitmask_linear as bitmask_kernels
from sparsekern.triton_kernels import nm_linear as nm_kernels
from tests.ops.strategies import misaligned
from tests.ops.test_bitmask_linear import assert_close_to_exact, packed_of, sparse
from tests.ops.test_nm_linear import nm_weight


@pytest.mark.parametrize("tokens", [1, 2])
def test_more_words_than_are_counted_at_a_time(generator, tokens):
    columns = 64 * bitmask_kernels.WORDS + 100
    weight = sparse(5, columns, torch.bfloat16, generator)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    packed = bitmask_kernels.Weight(*packed_of(weight))
    assert_close_to_exact(bitmask_kernels.product(x, packed, None, None), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unpacked_to_the_bit(poisoned, generator, dtype):
    weight = sparse(37, 200, dtype, generator)
    packed = bitmask_kernels.Weight(*packed_of(weight))
    assert torch.equal(bitmask_kernels.unpacked(packed, 200, None), weight)
    weight = nm_weight(19, 50, 3, 8, dtype, generator)
    assert torch.equal(nm_kernels.unpacked(*pack_nm_rows(weight, 3, 8).values(), 3, 8, 400), weight)


def test_values_that_begin_inside_a_slot_are_moved(generator):
    weight = sparse(20, 70, torch.bfloat16, generator)
    values, *others = packed_of(weight)
    moved = misaligned(values)
    assert moved.data_ptr() % 4 == 2 and bitmask_kernels.weight_of(moved, *others).values.data_ptr() % 4 == 0
    x = torch.randn(1, 70, generator=generator).bfloat16()
    assert torch.equal(bitmask_linear(x, moved, *others), bitmask_linear(x, values, *others))


def test_a_weight_is_checked_by_its_first_product_only(monkeypatch, generator):
    waits = []
    monkeypatch.setattr(bitmask_table, "raise_if", lambda status: waits.append(backends.raise_if(status)))
    values, bitmask, starts, order = packed_of(sparse(20, 70, torch.float32, generator))
    x = torch.randn(1, 70, generator=generator)
    with backends.value_checks(False):
        bitmask_linear(x, values, bitmask, starts, order)
    assert not waits
    for _ in range(2):
        bitmask_linear(x, values, bitmask, starts, order)
    assert len(waits) == 1
    bitmask_linear(x, values, bitmask, starts, order.clone())
    assert len(waits) == 2
    astray = order.clone()
    astray[3] = 20
    for _ in range(2):  # what was refused is no less refused the second time
        with pytest.raises(ValueError, match="order: expected rows from 0 to 19, got 20"):
            bitmask_linear(x, values, bitmask, starts, astray)
    assert len(waits) == 2


@pytest.mark.parametrize("name", ["bitmask_linear", "nm_linear"])
def test_products_that_are_not_served(name):
    (implementation,) = (known for known in backends.implementations(name) if known.name == "triton")
    supported = implementation.supports(torch.empty(0, 2**26 + 1))
    assert supported == (False, f"x has {2**26 + 1} input features, more than {2**26}")
    assert implementation.supports(torch.empty(0, 2**26)).ok


@pytest.mark.parametrize(("name", "tensors"), [("bitmask_unpack", 4), ("nm_unpack", 2)])
def test_weights_that_are_not_unpacked(name, tensors):
    (implementation,) = backends.implementations(name)
    given = [torch.empty(0)] * tensors + ([] if name == "bitmask_unpack" else [2, 4])
    assert implementation.supports(*given, 2**26 + 4) == (False, f"the weight has {2**26 + 4} input features, more than {2**26}")
    assert implementation.supports(*given, 2**26).ok


def test_direct_calls_do_not_leave_their_memory():
    packed = bitmask_kernels.Weight(**pack_bitmask_rows(torch.ones(20, 70)))
    x = torch.ones(2, 70)
    for changed, message in (
        ({"values": packed.values[: SLACK - 1]}, r"values: expected shape \(64,\) of torch.float32"),
        ({"bitmask": packed.bitmask[:, :1]}, r"bitmask: expected shape \(20, 2\) of torch.int64"),
        ({"starts": packed.starts[1:]}, r"starts: expected shape \(3,\) of torch.int64"),
        ({"order": packed.order.long()}, r"order: expected shape \(20,\) of torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            bitmask_kernels.product(x, packed._replace(**changed), None, None)
    with pytest.raises(ValueError, match="x: expected at most 16 tokens, got 17"):
        bitmask_kernels.product(torch.ones(17, 70), packed, None, None)
    with pytest.raises(ValueError, match=r"bias: expected shape \(20,\) of torch.float32"):
        bitmask_kernels.product(x, packed, torch.ones(19), None)
    values, codes = pack_nm_rows(torch.zeros(20, 72), 2, 4).values()
    x = torch.ones(2, 72)
    with pytest.raises(ValueError, match=r"values: expected shape \(20, 48\) of torch.float32"):
        nm_kernels.product(x, values[:, :32], codes, 2, 4, None)
    with pytest.raises(ValueError, match=r"codes: expected shape \(20, 3\) of torch.int32"):
        nm_kernels.product(x, values, codes[:, :2], 2, 4, None)
    with pytest.raises(ValueError, match="x: expected at most 16 tokens, got 17"):
        nm_kernels.product(torch.ones(17, 72), values, codes, 2, 4, None)
