"""What is particular to the kernels of `masked_lstsq`: wide rows, rows that are done, and when the host looks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sparsekern import backends
from sparsekern.backends import masked_lstsq as backend
from sparsekern.ops.masked_lstsq import reference
from sparsekern.triton_kernels import masked_lstsq as kernels

(TRITON,) = backends.implementations("masked_lstsq")


def problem(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that keep from nothing to everything, so that they are done at different times; the third feature is dead."""
    x = torch.randn(3 * columns, columns, generator=generator)
    x[:, 2:3] = 0
    weight = torch.randn(rows, columns, generator=generator)
    return weight, x.T @ x, torch.rand(rows, columns, generator=generator) < torch.linspace(0, 1.01, rows)[:, None]


def after(iterations: int, weight, gram, mask, tolerance: float = 1e-6) -> kernels.Rows:
    rows = kernels.prepare(weight, gram, mask, None, 0.0)
    backend.add_product(rows.product, rows.direction, rows.unit, begins=True)
    rows.begin_()
    backend._iterate(rows, tolerance, iterations)
    return rows


def copy_of(rows: kernels.Rows) -> kernels.Rows:
    return kernels.Rows(*(getattr(rows, field.name).clone() for field in dataclasses.fields(rows)))


def assert_same_state(got: kernels.Rows, want: kernels.Rows, rows: torch.Tensor) -> None:
    for name in ("solution", "residual", "direction", "gamma", "error", "floor", "last"):
        assert torch.equal(getattr(got, name)[rows], getattr(want, name)[rows]), name


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Rows of more than 64 columns are wide, and gone through by steps of 512."""
    monkeypatch.setattr(kernels, "WIDEST", 64)
    monkeypatch.setattr(kernels, "LEAST", 512)
    monkeypatch.setattr(kernels, "WIDE", 512)


@pytest.mark.parametrize(("columns", "dtype"), [(65, torch.float32), (70, torch.float16), (520, torch.bfloat16)])
def test_rows_that_no_tile_holds(narrow_tiles, generator, poisoned, columns, dtype):
    weight, gram, mask = problem(4, columns, generator)
    weight = weight.to(dtype)
    settings = {"damping": 0.1, "tolerance": 1e-9, "solver": "cg"}
    assert not kernels.config(columns).whole
    new_weight, row_error, unfinished = TRITON.run(weight, gram, mask, **settings)
    expected, expected_error, _ = reference(weight, gram, mask, **settings)
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(new_weight, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(row_error, expected_error, rtol=2e-5, atol=2e-5 * float(expected_error.max()))
    assert int(unfinished) == 0 and (new_weight[~mask] == 0).all() and (new_weight[:, 2] == 0).all()


def test_wide_rows_take_the_steps_of_whole_ones(generator, monkeypatch):
    given = problem(4, 100, generator)
    whole = after(3, *given)
    monkeypatch.setattr(kernels, "WIDEST", 64)
    monkeypatch.setattr(kernels, "LEAST", 512)
    monkeypatch.setattr(kernels, "WIDE", 512)
    wide = after(3, *given)
    for name in ("solution", "residual", "direction", "gamma", "error"):
        want = getattr(whole, name)
        torch.testing.assert_close(getattr(wide, name), want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_iterations_beyond_the_last_change_nothing(generator):
    rows = after(100, *problem(12, 40, generator))
    assert not rows.gamma.any()
    before = copy_of(rows)
    for iteration in (101, 102):
        backend.add_product(rows.product, rows.direction, rows.unit, begins=True)
        rows.step_(1e-6, iteration)
    assert_same_state(rows, before, torch.arange(12))
    assert torch.equal(rows.latest, before.latest)


@pytest.mark.parametrize("wide", [False, True])
def test_rows_that_are_done_are_not_read_or_written(generator, request, wide):
    if wide:
        request.getfixturevalue("narrow_tiles")
    rows = after(4, *problem(12, 70, generator), tolerance=0.01)
    done = rows.gamma == 0
    assert done.any() and not done.all()
    rows.product[done] = math.nan
    before = copy_of(rows)
    rows.step_(0.01, 5)
    assert_same_state(rows, before, done)
    assert rows.solution.isfinite().all() and not torch.equal(rows.solution, before.solution)


def test_the_host_looks_one_iteration_late_and_the_result_is_that_of_the_last_needed(generator, monkeypatch):
    given = problem(12, 40, generator)
    products = []
    multiply = backend.add_product
    monkeypatch.setattr(backend, "add_product", lambda *a, **k: products.append(0) or multiply(*a, **k))
    rows = after(100, *given)
    needed = int(rows.latest) + 1  # the iteration in which the last row was done
    assert 3 < needed < 99
    assert len(products) == 1 + needed + 1  # the first is of the start, the last in vain
    exactly = after(needed, *given)
    assert_same_state(exactly, rows, torch.arange(12))
    assert int((after(needed - 1, *given).gamma > 0).sum()) > 0


def test_no_iteration_is_needed_where_all_is_kept_or_nothing(generator):
    weight, gram, mask = problem(4, 40, generator)
    for all_kept in (True, False):
        new_weight, _, unfinished = TRITON.run(weight, gram, torch.full_like(mask, all_kept), max_iterations=1)
        assert int(unfinished) == 0
        expected = weight.clone() if all_kept else torch.zeros_like(weight)
        expected[:, 2] = 0
        torch.testing.assert_close(new_weight, expected)


def test_a_second_call_gives_the_same_bits(generator):
    given = problem(12, 40, generator)
    for first, second in zip(TRITON.run(*given), TRITON.run(*given), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(generator, dtype):
    given = problem(4, 16, generator)
    expected = TRITON.run(*given)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = TRITON.run(*given)
    finally:
        torch.set_default_dtype(before)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_products_are_in_float32_whatever_is_allowed(generator, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []
    multiply = backend.add_product
    monkeypatch.setattr(backend, "add_product", lambda *a, **k: seen.append(matmul.fp32_precision) or multiply(*a, **k))
    try:
        matmul.fp32_precision = "tf32"
        TRITON.run(*problem(4, 16, generator))
        assert set(seen) == {"ieee"} and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_without_value_checks_a_nan_stays_in_its_row(generator):
    weight, gram, mask = problem(12, 40, generator)
    expected = TRITON.run(weight, gram, mask)[0]
    weight[5, 7] = math.nan
    with backends.value_checks(False):
        new_weight, row_error, unfinished = TRITON.run(weight, gram, mask)
    assert int(unfinished) == 0 and row_error.isnan().tolist() == [row == 5 for row in range(12)]
    others = torch.arange(12) != 5
    torch.testing.assert_close(new_weight[others], expected[others], rtol=0, atol=0)


@pytest.mark.parametrize("place", [(0, 0), (69, 0), (69, 69), (68, 67), (30, 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_the_gram_matrix_is_seen(generator, place, value):
    weight, gram, mask = problem(1, 70, generator)
    gram[place] = value
    gram = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    assert int(kernels.prepare(weight, gram, mask, None, 0.0).status) == 1


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130])
def test_the_gram_matrix_with_a_unit_diagonal(generator, poisoned, columns):
    weight, gram, mask = problem(1, columns, generator)
    wide = torch.full((columns, columns + 7), math.nan)
    wide[:, :columns] = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    rows = kernels.prepare(weight, wide[:, :columns], mask, None, 0.1)
    damped = gram.double() + 0.1 * gram.double().diagonal().mean() * torch.eye(columns)
    scale = damped.diagonal().rsqrt().masked_fill(gram.diagonal() == 0, 0)
    torch.testing.assert_close(rows.unit.double(), damped * scale * scale[:, None], rtol=1e-5, atol=1e-6)
    assert torch.equal(rows.unit, rows.unit.T) and set(rows.unit.diagonal().tolist()) <= {0.0, 1.0}


def test_an_empty_matrix_is_left_to_the_reference():
    with pytest.raises(backends.LeftToReference, match="an empty matrix"):
        TRITON.run(torch.zeros(0, 8), torch.eye(8), torch.zeros(0, 8, dtype=torch.bool))


W, G, M = torch.zeros(2, 8), torch.eye(8), torch.ones(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "start", "message"),
    [
        ((W, G[:7, :7], M), None, r"gram: expected shape \(8, 8\) of torch.float32 on .*, got \(7, 7\)"),
        ((W, G, M[:1]), None, r"mask: expected shape \(2, 8\) of torch.bool on .*, got \(1, 8\)"),
        ((W, G, W), None, "mask: .* got .* of torch.float32"),
        ((W.double(), G, M), None, "weight: .* got .* of torch.float64"),
        ((W, G, M), W.half(), "start: expected .* of torch.float32 on .*, got .* of torch.float16"),
    ],
)
def test_a_direct_call_does_not_leave_its_memory(arguments, start, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.sparsekern.masked_lstsq(*arguments, start=start)
