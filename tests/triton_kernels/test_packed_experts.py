"""What is particular to the Triton kernels of the products with packed experts; their results are tested beside the ops."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekern import backends
from sparsekern.backends import bitmask_experts_linear as bitmask_table
from sparsekern.backends import nm_experts_linear as nm_table
from sparsekern.ops import bitmask_experts_linear, nm_experts_linear
from sparsekern.triton_kernels import _experts
from sparsekern.triton_kernels import bitmask_experts_linear as bitmask_kernels
from sparsekern.triton_kernels import nm_experts_linear as nm_kernels
from sparsekern.triton_kernels.bitmask_linear import Weight
from tests.ops import test_bitmask_experts_linear as bitmask_tests
from tests.ops import test_nm_experts_linear as nm_tests
from tests.ops.experts import assert_close_to_exact, choice, sparse_experts


def jobs_by_hand(ids: list[int], count: int, width: int) -> list[tuple[int, list[int]]]:
    """Expert and pairs of each job, in order; every id of no expert stands for expert `count`."""
    known = [expert if 0 <= expert < count else count for expert in ids]
    jobs = []
    for expert in sorted(set(known)):
        pairs = [pair for pair, own in enumerate(known) if own == expert]
        jobs += [(expert, pairs[first : first + width]) for first in range(0, len(pairs), width)]
    return jobs


def jobs_found(found: _experts.Jobs) -> list[tuple[int, list[int]]]:
    pairs = len(found.ids)
    total, *places = found.places.tolist()
    assert 0 < total <= found.most
    jobs = [places[pairs + 3 * job :][:3] for job in range(total)]
    return [(expert, places[first : first + many]) for expert, first, many in jobs]


@pytest.mark.parametrize(
    ("count", "width", "tokens", "choices"), [(1, 4, 9, 1), (5, 4, 3, 1), (8, 16, 50, 2), (64, 16, 33, 8), (1023, 4, 3, 3)]
)
def test_pairs_are_grouped_by_expert(poisoned, generator, count, width, tokens, choices):
    experts = choice(count, tokens, choices, generator)
    found = _experts.jobs_of(experts, count, width)
    assert jobs_found(found) == jobs_by_hand(experts.flatten().tolist(), count, width)


@pytest.mark.parametrize("ids", [[3] * 40, [-1, 4, 2**62, 0, -(2**63), 2**32, 1, 3]])
def test_all_pairs_of_one_expert_and_ids_of_none(ids):
    found = _experts.jobs_of(torch.tensor(ids)[:, None], 4, 4)
    assert jobs_found(found) == jobs_by_hand(ids, 4, 4)


@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("tokens", [2, 17, 100])
def test_there_are_never_more_jobs_than_are_launched(generator, count, tokens):
    """With experts as evenly and as unevenly filled as they can be."""
    for ids in (torch.arange(tokens) % (count + 1), torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) // 5 % count):
        for width in (4, 16, 64):
            most = min(tokens, min(tokens, count + 1) + tokens // width)
            assert len(jobs_by_hand(ids.tolist(), count, width)) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_with_many_tokens(generator, dtype):
    """Seventy tokens and more of one expert, some of another, and one expert without any."""
    experts = torch.zeros(100, 1, dtype=torch.int64)
    experts[::4] = 2
    assert _experts.width_of(experts, 3, dtype) == _experts.MANY
    x = torch.randn(100, 132, generator=generator).to(dtype)
    weight = sparse_experts(3, 20, 132, dtype, generator)
    assert_close_to_exact(bitmask_experts_linear(x, experts, *bitmask_tests.packed_of(weight)), x, experts, weight)
    weight = nm_tests.experts_of(3, 20, 132, 2, 4, dtype, generator)
    assert_close_to_exact(nm_experts_linear(x, experts, *nm_tests.packed_of(weight, 2, 4), 2, 4), x, experts, weight)


def test_float32_takes_no_wide_jobs():
    experts = torch.zeros(500, 2, dtype=torch.int64)
    assert _experts.width_of(experts, 4, torch.float32) == _experts.width_of(experts[:50], 4, torch.bfloat16) == 16
    assert _experts.width_of(experts[:1], 4, torch.bfloat16) == 1


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_not_finite_reaches_the_outputs_that_it_belongs_to(generator, tokens):
    """A NaN of a kept weight and of a token, and an infinity times a zero that is not stored."""
    weight = sparse_experts(3, 20, 72, torch.bfloat16, generator)
    weight[1, 4, 0] = math.nan
    x = torch.randn(tokens, 72, generator=generator).bfloat16()
    experts = torch.tensor([[0, 1]]).expand(tokens, 2)
    y = bitmask_experts_linear(x, experts, *bitmask_tests.packed_of(weight))
    assert y.isnan().nonzero().tolist() == [[token, 1, 4] for token in range(tokens)]
    x[0, 3] = math.nan
    y = bitmask_experts_linear(x, experts, *bitmask_tests.packed_of(weight))
    assert y[0].isnan().all() and not y[1:, 0].isnan().any()


@pytest.mark.parametrize("tokens", [1, 6])
def test_unchecked_ids_of_no_expert_give_nan_and_nothing_else(generator, tokens):
    x = torch.randn(tokens, 72, generator=generator)
    experts = torch.tensor([[2, 3, 0, -1, 2**62]]).expand(tokens, 5).clone()
    weight = sparse_experts(3, 20, 72, torch.float32, generator)
    two_of_four = nm_tests.experts_of(3, 20, 72, 2, 4, torch.float32, generator)
    bias = torch.randn(3, 20, generator=generator)
    with backends.value_checks(False):
        products = (
            (weight, bitmask_experts_linear(x, experts, *bitmask_tests.packed_of(weight), bias)),
            (two_of_four, nm_experts_linear(x, experts, *nm_tests.packed_of(two_of_four, 2, 4), 2, 4, bias)),
        )
    for dense, y in products:
        assert y[:, [1, 3, 4]].isnan().all()
        assert_close_to_exact(y[:, [0, 2]], x, experts[:, [0, 2]], dense, bias)


def test_experts_are_checked_by_their_first_product_only(monkeypatch, generator):
    waits = []
    for table in (bitmask_table, nm_table):
        monkeypatch.setattr(table, "raise_if", lambda status: waits.append(backends.raise_if(status)))
    x, experts = torch.randn(2, 72, generator=generator), torch.tensor([[0], [2]])
    packed = bitmask_tests.packed_of(sparse_experts(3, 20, 72, torch.float32, generator))
    two_of_four = nm_tests.packed_of(nm_tests.experts_of(3, 20, 72, 2, 4, torch.float32, generator), 2, 4)
    calls = (
        lambda ids: bitmask_experts_linear(x, ids, *packed),
        lambda ids: nm_experts_linear(x, ids, *two_of_four, 2, 4),
    )
    for call in calls:
        waits.clear()
        with backends.value_checks(False):
            call(experts)
        call(experts[:, :0])  # checks nothing
        for _ in range(2):
            with pytest.raises(ValueError, match="experts: expected ids from 0 to 2, got 3"):
                call(experts + 1)
        before = len(waits)
        for _ in range(3):
            call(experts)
        assert len(waits) == before + 1


@pytest.mark.parametrize(("name", "packed"), [("bitmask_experts_linear", 4), ("nm_experts_linear", 2)])
def test_products_that_are_not_served(name, packed):
    (implementation,) = backends.implementations(name)

    def supports(columns: int, count: int, pairs: int):
        rest = [torch.empty(count, 0)] * packed + ([2, 4] if packed == 2 else [])
        return implementation.supports(torch.empty(0, columns), torch.empty(pairs, 1, device="meta"), *rest)

    assert supports(2**26, 1023, 2**24).ok
    assert supports(2**26 + 1, 3, 1) == (False, f"x has {2**26 + 1} input features, more than {2**26}")
    assert supports(64, 1024, 1) == (False, "there are 1024 experts, more than 1023")
    assert supports(64, 3, 2**24 + 1) == (False, f"experts names {2**24 + 1}, more than {2**24}")


def test_direct_calls_do_not_leave_their_memory(generator):
    packed = Weight(*bitmask_tests.packed_of(sparse_experts(3, 20, 70, torch.float32, generator)))
    x, experts = torch.ones(2, 70), torch.zeros(2, 1, dtype=torch.int64)
    for changed, message in (
        ({"values": packed.values[:63]}, r"values: expected shape \(64,\) of torch.float32"),
        ({"bitmask": packed.bitmask[..., :1]}, r"bitmask: expected shape \(3, 20, 2\) of torch.int64"),
        ({"starts": packed.starts[:, 1:]}, r"starts: expected shape \(3, 3\) of torch.int64"),
        ({"order": packed.order.long()}, r"order: expected shape \(3, 20\) of torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            bitmask_kernels.product(x, experts, packed._replace(**changed), None, None)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3, 20\) of torch.float32"):
        bitmask_kernels.product(x, experts, packed, torch.ones(20), None)
    with pytest.raises(ValueError, match=r"experts: expected shape \(2, 1\) of torch.int64"):
        bitmask_kernels.product(x, experts[:1], packed, None, None)
    values, codes = nm_tests.packed_of(torch.zeros(3, 20, 72), 2, 4)
    x = torch.ones(2, 72)
    with pytest.raises(ValueError, match=r"values: expected shape \(3, 20, 48\) of torch.float32"):
        nm_kernels.product(x, experts, values[..., :32], codes, 2, 4, None, None)
    with pytest.raises(ValueError, match=r"codes: expected shape \(3, 20, 3\) of torch.int32"):
        nm_kernels.product(x, experts, values, codes[..., :2], 2, 4, None, None)
    with pytest.raises(ValueError, match="x, experts: expected 2 dimensions each, got shapes .*2, 72.* and .*2,"):
        nm_kernels.product(x, experts[:, 0], values, codes, 2, 4, None, None)
    with pytest.raises(ValueError, match="experts: expected none, since there are no experts"):
        nm_kernels.product(x, experts, values[:0], codes[:0], 2, 4, None, None)
