from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.packed_experts import check_bitmask_experts, join_bitmask_experts
from sparsekern.layouts.packed_rows import SLACK, pack_bitmask_rows
from sparsekern.ops import bitmask_experts_linear

from .experts import EXACT_CASES, assert_close_to_exact, choice, sparse_experts
from .strategies import FEW_KERNELS, FLOATS, INTERPRETED

ORDER = ("values", "bitmask", "starts", "order")


def packed_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """Pack `[experts, rows, columns]`."""
    packed = join_bitmask_experts([pack_bitmask_rows(own) for own in weight], weight.shape[1:], weight.dtype)
    return [packed[name] for name in ORDER]


def test_the_layout_is_what_files_hold():
    """The slots of the second expert begin where those of the first end; only the last has slack."""
    weight = torch.tensor([[[1.0, 2, 0], [0, 3, 0]], [[0, 0, 4], [5, 0, 6]]]).bfloat16()
    values, bitmask, starts, order = packed_of(weight)
    assert values.tolist() == [3, 1, 0, 2, 4, 5, 0, 6] + [0] * (2 * SLACK)
    assert bitmask.tolist() == [[[0b010], [0b011]], [[0b100], [0b101]]]
    assert starts.tolist() == [[0, 2], [2, 4]] and order.tolist() == [[1, 0], [0, 1]]
    check_bitmask_experts(values, bitmask, starts, order, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", EXACT_CASES)
def test_equals_the_dense_products(isa, poisoned, generator, case, dtype):
    count, rows, columns, tokens, choices = case
    weight = sparse_experts(count, rows, columns, dtype, generator)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(count, rows, generator=generator).to(dtype)
    experts = choice(count, tokens, choices, generator)
    assert_close_to_exact(bitmask_experts_linear(x, experts, *packed_of(weight)), x, experts, weight)
    assert_close_to_exact(bitmask_experts_linear(x, experts, *packed_of(weight), bias), x, experts, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_experts_with_few_and_with_many_tokens_on_threads(isa, threads, generator, dtype):
    threads(3)
    weight = sparse_experts(3, 40 if INTERPRETED else 200, 330, dtype, generator)
    x = torch.randn(50, 330, generator=generator).to(dtype)
    experts = torch.zeros(50, 1, dtype=torch.int64)
    experts[3], experts[7] = 2, 2
    assert_close_to_exact(bitmask_experts_linear(x, experts, *packed_of(weight)), x, experts, weight)


def test_an_expert_may_be_named_twice_and_in_any_order(isa, generator):
    weight = sparse_experts(3, 20, 70, torch.float32, generator)
    x = torch.randn(2, 70, generator=generator)
    experts = torch.tensor([[2, 0, 2], [0, 0, 1]])
    assert_close_to_exact(bitmask_experts_linear(x, experts, *packed_of(weight)), x, experts, weight)


def test_experts_that_are_not_named_are_not_read(isa, generator):
    weight = sparse_experts(3, 20, 70, torch.float32, generator)
    weight[1] = math.nan
    x = torch.randn(4, 70, generator=generator)
    experts = torch.tensor([[0], [2], [2], [0]])
    assert bitmask_experts_linear(x, experts, *packed_of(weight)).isfinite().all()
    assert bitmask_experts_linear(x, torch.ones_like(experts), *packed_of(weight)).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 5, 2, 0), (2, 0, 5, 3, 1), (2, 4, 0, 3, 2), (2, 4, 5, 0, 2), (2, 4, 5, 3, 0)])
def test_sizes_of_zero(isa, generator, shape):
    count, rows, columns, tokens, choices = shape
    weight = sparse_experts(count, rows, columns, torch.float32, generator)
    y = bitmask_experts_linear(
        torch.randn(tokens, columns, generator=generator), choice(max(count, 1), tokens, choices, generator), *packed_of(weight)
    )
    assert torch.equal(y, torch.zeros(tokens, choices, rows))


@pytest.mark.parametrize("dtype", FLOATS[1:2] if FEW_KERNELS else FLOATS)
@pytest.mark.parametrize("tokens", [1, 3] if FEW_KERNELS else [1, 3, 40])
def test_contradicting_tensors_cannot_lead_the_kernel_out_of_them(isa, generator, dtype, tokens):
    """Nothing but an error may come of this, with the sanitized build in particular."""
    weight = sparse_experts(2, 40, 300, dtype, generator, zeros=0.9)
    values, bitmask, starts, order = packed_of(weight)
    x = torch.randn(tokens, 300, generator=generator).to(dtype)
    experts = torch.ones(tokens, 1, dtype=torch.int64)
    wrong_bits = bitmask.clone()
    wrong_bits[1, 39] = -1
    wrong_bits[1, :5] = -1
    with pytest.raises(ValueError, match="bitmask: expected no more set bits than there are values"):
        bitmask_experts_linear(x, experts, values, wrong_bits, starts, order)
    for wrong in (-1, 2**62, int(starts[1, -1]) + 1):
        moved = starts.clone()
        moved[1, 1] = wrong
        with pytest.raises(ValueError, match="starts: expected ascending offsets of at most"):
            torch.ops.sparsekern.bitmask_experts_linear(x, experts, values, bitmask, moved, order)
    for wrong in (-1, 40):
        moved = order.clone()
        moved[1, 7] = wrong
        with pytest.raises(ValueError, match=f"order: expected rows from 0 to 39, got {wrong}"):
            torch.ops.sparsekern.bitmask_experts_linear(x, experts, values, bitmask, starts, moved)
    for wrong in (-1, 2, 2**62):
        with pytest.raises(ValueError, match=f"experts: expected ids from 0 to 1, got {wrong}"):
            torch.ops.sparsekern.bitmask_experts_linear(x, experts * wrong, values, bitmask, starts, order)


def test_what_is_refused(generator):
    x, experts = torch.ones(2, 70), torch.zeros(2, 1, dtype=torch.int64)
    values, bitmask, starts, order = packed_of(sparse_experts(3, 20, 70, torch.float32, generator))
    for wrong, message in (
        ((x.double(), experts, values, bitmask, starts, order), "x: expected dtype"),
        ((x[0], experts, values, bitmask, starts, order), r"x: expected 2 dimensions, got shape \(70,\)"),
        ((x, experts.int(), values, bitmask, starts, order), "experts: expected dtype int64, got int32"),
        ((x, experts[:1], values, bitmask, starts, order), r"experts: expected shape \(2, 'any'\), got \(1, 1\)"),
        ((x, experts, values.bfloat16(), bitmask, starts, order), "values: expected dtype float32, got bfloat16"),
        ((x[:, :64], experts, values, bitmask, starts, order), r"bitmask: expected shape \(3, 20, 1\), got \(3, 20, 2\)"),
        (
            (x, experts, values[: SLACK - 1], bitmask, starts, order),
            "values: expected a whole number of slots, 64 of them spare, got 63",
        ),
        ((x, experts, values, bitmask, starts[1:], order), r"starts: expected shape \(3, 3\), got \(2, 3\)"),
        ((x, experts, values, bitmask, starts, order.long()), "order: expected dtype int32, got int64"),
        ((x, experts, values, bitmask, starts, order, torch.ones(20)), r"bias: expected 2 dimensions, got shape \(20,\)"),
        ((x, experts, values, bitmask, starts, order, torch.ones(3, 19)), r"bias: expected shape \(3, 20\), got \(3, 19\)"),
        ((x, experts + 3, values, bitmask, starts, order), "experts: expected ids from 0 to 2, got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bitmask_experts_linear(*wrong)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("starts", (1, 0), "starts: expected expert 1 to begin at slot"),
        ("starts", (2, -1), "starts: expected the values to end at slot"),
        ("starts", (2, 1), r"starts: expected the first slot after the values of earlier tiles, .* \(expert 2\)"),
        ("order", (2, 0), r"order: expected each row from 0 to 19 once \(expert 2\)"),
        ("bitmask", (0, 3, 1), r"(?s).*\(expert 0\)"),
    ],
)
def test_checked_before_they_are_trusted(generator, name, place, message):
    packed = dict(zip(ORDER, packed_of(sparse_experts(3, 20, 70, torch.float32, generator)), strict=True))
    check_bitmask_experts(**packed, columns=70)
    packed[name][place] += 1
    with pytest.raises(ValueError, match=message):
        check_bitmask_experts(**packed, columns=70)
