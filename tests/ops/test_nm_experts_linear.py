from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.packed_rows import pack_nm_rows
from sparsekern.ops import nm_experts_linear

from .experts import EXACT_CASES, assert_close_to_exact, choice
from .strategies import FEW_KERNELS, INTERPRETED
from .test_nm_linear import nm_weight

PROBLEMS = [(2, 4, torch.bfloat16, case) for case in EXACT_CASES]
PROBLEMS += [(3, 8, torch.float32, EXACT_CASES[2]), (2, 4, torch.float16, EXACT_CASES[3])]
if not FEW_KERNELS:
    PROBLEMS += [
        (1, 3, torch.bfloat16, EXACT_CASES[3]),
        (8, 16, torch.float16, EXACT_CASES[2]),
        (2, 4, torch.float32, EXACT_CASES[3]),
    ]


def packed_of(weight: torch.Tensor, n: int, m: int) -> list[torch.Tensor]:
    """Pack `[experts, rows, columns]`."""
    packed = [pack_nm_rows(own, n, m) for own in weight]
    return [torch.stack([own[name] for own in packed]) for name in ("values", "codes")]


def experts_of(count: int, rows: int, columns: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    groups = max(1, columns // m)
    return torch.stack([nm_weight(rows, groups, n, m, dtype, generator) for _ in range(count)])


@pytest.mark.parametrize(("n", "m", "dtype", "case"), PROBLEMS)
def test_equals_the_dense_products(isa, poisoned, generator, case, n, m, dtype):
    count, rows, columns, tokens, choices = case
    weight = experts_of(count, rows, columns, n, m, dtype, generator)
    x = torch.randn(tokens, weight.shape[2], generator=generator).to(dtype)
    bias = torch.randn(count, rows, generator=generator).to(dtype)
    experts = choice(count, tokens, choices, generator)
    packed = packed_of(weight, n, m)
    assert_close_to_exact(nm_experts_linear(x, experts, *packed, n, m), x, experts, weight)
    assert_close_to_exact(nm_experts_linear(x, experts, *packed, n, m, bias), x, experts, weight, bias)


def test_experts_with_few_and_with_many_tokens_on_threads(isa, threads, generator):
    threads(3)
    weight = experts_of(3, 40 if INTERPRETED else 200, 328, 2, 4, torch.bfloat16, generator)
    x = torch.randn(50, 328, generator=generator).bfloat16()
    experts = torch.zeros(50, 1, dtype=torch.int64)
    experts[3], experts[7] = 2, 2
    assert_close_to_exact(nm_experts_linear(x, experts, *packed_of(weight, 2, 4), 2, 4), x, experts, weight)


def test_experts_that_are_not_named_are_not_read(isa, generator):
    weight = experts_of(3, 20, 72, 2, 4, torch.float32, generator)
    values, codes = packed_of(weight, 2, 4)
    values[1] = math.nan
    x = torch.randn(4, 72, generator=generator)
    experts = torch.tensor([[0], [2], [2], [0]])
    assert nm_experts_linear(x, experts, values, codes, 2, 4).isfinite().all()
    assert nm_experts_linear(x, torch.ones_like(experts), values, codes, 2, 4).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 8, 2, 0), (2, 0, 8, 3, 1), (2, 4, 0, 3, 2), (2, 4, 8, 0, 2), (2, 4, 8, 3, 0)])
def test_sizes_of_zero(isa, shape):
    count, rows, columns, tokens, choices = shape
    packed = pack_nm_rows(torch.zeros(count * rows, columns), 2, 4)
    values, codes = (packed[name].view(count, rows, packed[name].shape[-1]) for name in ("values", "codes"))
    experts = torch.zeros(tokens, choices, dtype=torch.int64)
    assert torch.equal(
        nm_experts_linear(torch.ones(tokens, columns), experts, values, codes, 2, 4), torch.zeros(tokens, choices, rows)
    )


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_positions_past_the_last_column_stay_inside(isa, generator, tokens):
    """Few tokens read zeros there, or another column; many are refused. None leaves its memory."""
    weight = experts_of(2, 20, 6, 2, 3, torch.float32, generator)
    values, codes = packed_of(weight, 2, 3)
    experts = torch.ones(tokens, 1, dtype=torch.int64)
    try:
        y = nm_experts_linear(torch.ones(tokens, 6), experts, values, torch.full_like(codes, -1), 2, 3)
    except ValueError as error:
        assert "codes: expected positions below m" in str(error)
    else:
        assert y.shape == (tokens, 1, 20)


def test_what_is_refused(generator):
    x, experts = torch.ones(2, 72), torch.zeros(2, 1, dtype=torch.int64)
    values, codes = packed_of(experts_of(3, 20, 72, 2, 4, torch.float32, generator), 2, 4)
    for wrong, message in (
        ((x.double(), experts, values, codes, 2, 4), "x: expected dtype"),
        ((x, experts.int(), values, codes, 2, 4), "experts: expected dtype int64, got int32"),
        ((x, experts[:1], values, codes, 2, 4), r"experts: expected shape \(2, 'any'\), got \(1, 1\)"),
        ((x, experts, values, codes, 4, 4), "n, m: expected n < m <= 16 .*, got 4:4"),
        ((x[:, :70], experts, values, codes, 2, 4), "x: expected features divisible by m = 4, got 70"),
        ((x, experts, values[0], codes, 2, 4), r"values: expected 3 dimensions, got shape \(20, 48\)"),
        ((x, experts, values[..., :32], codes, 2, 4), r"values: expected shape \('any', 'any', 48\), got \(3, 20, 32\)"),
        ((x, experts, values, codes.long(), 2, 4), "codes: expected dtype int32, got int64"),
        ((x, experts, values, codes[:2], 2, 4), r"codes: expected shape \(3, 20, 3\), got \(2, 20, 3\)"),
        ((x, experts, values, codes, 2, 4, torch.ones(3, 19)), r"bias: expected shape \(3, 20\), got \(3, 19\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_experts_linear(*wrong)


@pytest.mark.parametrize("wrong", [-1, 3, 2**62])
def test_ids_of_no_expert_are_refused(isa, generator, wrong):
    values, codes = packed_of(experts_of(3, 20, 72, 2, 4, torch.float32, generator), 2, 4)
    experts = torch.tensor([[1], [wrong]])
    with pytest.raises(ValueError, match=f"experts: expected ids from 0 to 2, got {wrong}"):
        nm_experts_linear(torch.ones(2, 72), experts, values, codes, 2, 4)
