"""Methods that say that rows are solved alone: parts of the rows give the solution of the whole."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ALPS, COPAL, NM, Magnitude, SparseGPT, SparseLLM, Structured, Unstructured, Wanda
from sparsekern.methods import LinearMethod, Random
from sparsekern.pattern import Pattern

from .conftest import make_layer

HALF = Unstructured(0.5)
ALONE = [
    (Magnitude(), NM(2, 4)),
    (Magnitude(scope="row"), HALF),
    (Wanda(), NM(4, 8)),
    (Wanda(), HALF),
    (SparseGPT(), NM(2, 4)),
    (SparseGPT(scope="row"), HALF),
    (SparseGPT(mask="wanda"), HALF),
    (SparseGPT(mask="magnitude"), NM(2, 4)),
    (SparseGPT(mask="zeros"), NM(2, 4)),
    (SparseGPT(keep_zeros=False, scope="matrix"), NM(2, 4)),
    (SparseLLM(solver="wanda"), HALF),
]
TOGETHER = [
    (Magnitude(), HALF),
    (Magnitude(scope="global"), HALF),
    (SparseGPT(), HALF),
    (SparseGPT(scope="matrix"), HALF),
    (SparseGPT(mask="magnitude", scope="row"), HALF),  # its mask counts over the matrix
    (SparseGPT(mask="zeros", scope="row"), HALF),
    (ALPS(), NM(2, 4)),  # one penalty for all rows
    (ALPS(scope="row"), HALF),
    (Random(scope="row"), HALF),  # one stream of numbers
    (COPAL(), NM(2, 4)),  # its statistic is of the whole weight
    (Structured(), HALF),
]


def solve_parts(method: LinearMethod, weight: torch.Tensor, statistics: object, pattern: Pattern, height: int) -> torch.Tensor:
    return torch.cat([method.solve(part, statistics, pattern).weight for part in weight.split(height)])


@pytest.mark.parametrize(("method", "pattern"), ALONE, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_parts_of_the_rows_are_solved_as_in_the_whole(method, pattern, zeros, generator):
    layer = make_layer(40, 64, 200)
    weight = layer.weight.masked_fill(torch.rand(40, 64, generator=generator) < zeros, 0)
    weight[:3] = layer.weight[:3]  # rows without zeros, beside others
    if getattr(method, "mask", None) == "zeros":
        weight = Magnitude().solve(layer.weight, None, pattern).weight
    statistics = layer.statistics()
    whole = method.solve(weight, statistics, pattern).weight
    parts = solve_parts(method, weight, statistics, pattern, 16)  # the last part has 8 rows
    assert method.solves_rows_alone(pattern)
    assert torch.equal(parts == 0, whole == 0)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "pattern"), TOGETHER, ids=str)
def test_rows_that_share_a_count_are_not_solved_alone(method, pattern):
    assert not method.solves_rows_alone(pattern)


@pytest.mark.parametrize(("method", "pattern"), TOGETHER[:4], ids=str)
def test_parts_would_differ_where_rows_share_a_count(method, pattern):
    layer = make_layer(40, 64, 200)
    layer.weight[:16] *= 3
    whole = method.solve(layer.weight, layer.statistics(), pattern).weight
    assert not torch.equal(solve_parts(method, layer.weight, layer.statistics(), pattern, 16) == 0, whole == 0)
