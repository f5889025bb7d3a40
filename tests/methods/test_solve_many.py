"""`solve_many`: the solutions of `solve`, whatever way several weights are solved together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from sparsekern import NM, Magnitude, Unstructured
from sparsekern.methods import Random
from sparsekern.methods.random_numbers import drawing_from


def weights_of(count: int, generator: torch.Generator, rows: int = 12, columns: int = 24) -> torch.Tensor:
    return torch.randn(count, rows, columns, generator=generator)


def test_each_weight_is_solved_in_its_own_context(generator):
    weights, entered = weights_of(3, generator), []

    @contextmanager
    def about(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    found = Magnitude().solve_many(list(weights), [None] * 3, NM(2, 4), about)
    assert entered == [0, 1, 2]
    for weight, solution in zip(weights, found, strict=True):
        assert torch.equal(solution.weight, Magnitude().solve(weight, None, NM(2, 4)).weight)


def test_the_context_seeds_random_masks(generator):
    weights, seeds = weights_of(1, generator).repeat(3, 1, 1), (5, 6, 5)

    def about(index: int) -> AbstractContextManager[None]:
        return drawing_from(torch.Generator().manual_seed(seeds[index]))

    first, other, again = Random().solve_many(weights, [None] * 3, Unstructured(0.5), about)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


def test_as_many_statistics_as_weights(generator):
    with pytest.raises(ValueError, match="zip"):
        Magnitude().solve_many(weights_of(2, generator), [None], NM(2, 4))
