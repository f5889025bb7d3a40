from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import admm_step_
from sparsekern.ops.admm_step import reference

from .strategies import PROPERTY, best

PATTERNS = [("2:4", "matrix"), ("1:2", "row"), ("5:12", "matrix"), (0.5, "matrix"), (0.3, "row"), (0.0, "matrix"), (0.0, "row")]


def state(rows: int, columns: int, generator: torch.Generator, rounded: bool = False) -> tuple[torch.Tensor, ...]:
    offset, dual, weight = (torch.randn(rows, columns, generator=generator) * 3 for _ in range(3))
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    dual = dual.masked_fill(mask, 0)
    return tuple(t.round() if rounded and t.is_floating_point() else t for t in (offset, dual, mask, weight))


@pytest.mark.parametrize(("pattern", "scope"), PATTERNS)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", [(1, 12), (7, 24), (40, 120), (3, 4104)])
def test_is_the_step_of_the_paper(isa, generator, pattern, scope, rounded, shape):
    offset, dual, mask, weight = state(*shape, generator, rounded)
    z = weight + offset + dual
    before = mask.clone()
    changed = admm_step_(offset, dual, mask, weight, pattern, scope=scope)
    projected = z * mask
    assert changed.item() == (mask != before).sum()
    torch.testing.assert_close(dual, z - projected, rtol=0, atol=0)
    torch.testing.assert_close(offset, projected - dual - weight, rtol=0, atol=0)
    assert (dual[mask] == 0).all()
    if isinstance(pattern, str):
        n, m = map(int, pattern.split(":"))
        kept = [best(group, n) for group in z.abs().view(-1, m).tolist()]
    else:
        lines = z.abs() if scope == "row" else z.abs().view(1, -1)
        kept = [best(line, lines.shape[1] - math.floor(lines.shape[1] * pattern)) for line in lines.tolist()]
    assert mask.flatten().tolist() == [keep for line in kept for keep in line]


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    case=st.sampled_from(PATTERNS),
    rounded=st.booleans(),
)
def test_equals_the_reference_bit_for_bit(isa, seed, rows, groups, case, rounded):
    ours = state(rows, 12 * groups, torch.Generator().manual_seed(seed), rounded)
    theirs = tuple(t.clone() for t in ours)
    pattern, scope = case
    arguments = dict(n=int(pattern[0]), m=int(pattern.split(":")[1])) if isinstance(pattern, str) else {"scope": scope}
    if not isinstance(pattern, str):
        total = 12 * groups * (rows if scope == "matrix" else 1)
        arguments["k"] = total - math.floor(total * pattern + 1e-9)
    assert admm_step_(*ours, pattern, scope=scope) == reference(*theirs, **arguments)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_strided_state_is_changed_in_place(isa, generator):
    expected = state(20, 48, generator)
    moved = [t.mT.contiguous().mT for t in expected]
    places = [t.data_ptr() for t in moved]
    for arguments in (expected, moved):
        admm_step_(*arguments, "2:4")
    for got, want, place in zip(moved, expected, places, strict=True):
        assert torch.equal(got, want) and got.data_ptr() == place


def test_the_weight_itself_is_a_fixed_point_where_nothing_is_pruned(isa, generator):
    _, _, _, weight = state(20, 48, generator)
    offset, dual = torch.zeros(2, 20, 48).unbind()
    mask = torch.zeros(20, 48, dtype=torch.bool)
    assert admm_step_(offset, dual, mask, weight, 0.0) == 20 * 48
    assert (offset == 0).all() and (dual == 0).all() and mask.all()


@pytest.mark.parametrize(
    "function", [admm_step_, lambda *a: reference(*a[:4], n=2, m=4) if a[4] == "2:4" else reference(*a[:4], k=5)]
)
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["offset", "dual", "weight"])
def test_values_that_are_not_finite_are_named(isa, generator, function, pattern, bad, name):
    offset, dual, mask, weight = state(50, 40, generator)
    {"offset": offset, "dual": dual, "weight": weight}[name][30, 20] = bad
    with pytest.raises(ValueError, match=rf"{name}: expected finite values, got {bad} at \[30, 20\]"):
        function(offset, dual, mask, weight, pattern)


F, B = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "scope", "error", "message"),
    [
        ((F, F, B, F.half(), "2:4"), "matrix", TypeError, "weight: expected dtype float32, got float16"),
        ((F[:1], F, B, F, "2:4"), "matrix", ValueError, r"offset: expected shape \(2, 8\), got \(1, 8\)"),
        ((F, F[0], B, F, "2:4"), "matrix", ValueError, r"dual: expected 2 dimensions, got shape \(8,\)"),
        ((F, F, F, F, "2:4"), "matrix", TypeError, "mask: expected dtype bool, got float32"),
        ((F, F, B, F, "2:5"), "matrix", ValueError, "weight: expected input features divisible by M=5 for pattern '2:5', got 8"),
        ((F, F, B, F, 1.5), "matrix", ValueError, "pattern: expected a sparsity of at least 0 and below 1, got 1.5"),
        ((F, F, B, F, 0.5), "block", ValueError, "scope: expected one of row, matrix, got 'block'"),
    ],
)
def test_refusals(arguments, scope, error, message):
    with pytest.raises(error, match=message):
        admm_step_(*arguments, scope=scope)


def test_empty(isa):
    for shape in ((0, 8), (3, 0)):
        offset, dual, weight = torch.zeros(3, *shape).unbind()
        for pattern in ("2:4", 0.5):
            assert admm_step_(offset, dual, torch.zeros(shape, dtype=torch.bool), weight, pattern) == 0
