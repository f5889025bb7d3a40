"""`solve_many`: the solutions of `solve`, whatever way several weights are solved together."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from sparsekern import NM, Magnitude, SparseGPT, Unstructured
from sparsekern.methods import LinearMethod, Random, Solution, sparsegpt
from sparsekern.methods.random_numbers import drawing_from
from sparsekern.methods.together import Staging, stacked
from sparsekern.pattern import Pattern

from .conftest import Layer, make_layer

reverse_cholesky = importlib.import_module("sparsekern.ops.reverse_cholesky")


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


def experts(count: int, rows: int = 24, columns: int = 64, dtype: torch.dtype = torch.float32) -> list[Layer]:
    return [make_layer(rows, columns, 200, seed, dtype) for seed in range(count)]


def assert_as_alone(method: LinearMethod, layers: list[Layer], pattern: Pattern) -> list[Solution]:
    found = method.solve_many([layer.weight for layer in layers], [layer.statistics() for layer in layers], pattern)
    for layer, solution in zip(layers, found, strict=True):
        alone = method.solve(layer.weight, layer.statistics(), pattern)
        assert solution.weight.dtype == layer.weight.dtype and solution.weight.is_contiguous()
        assert torch.equal(solution.weight, alone.weight)
        if alone.row_error is not None:
            torch.testing.assert_close(solution.row_error, alone.row_error, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
@pytest.mark.parametrize(
    "method",
    [SparseGPT(), SparseGPT(scope="row", damping=0.1), SparseGPT(mask="wanda"), SparseGPT(mask="magnitude", scope="matrix")],
    ids=str,
)
def test_sparsegpt_solves_each_weight_as_if_alone(method, pattern, dtype):
    found = assert_as_alone(method, experts(3, dtype=dtype), pattern)
    for layer, solution in zip(experts(3, dtype=dtype), found, strict=True):
        delta = solution.weight.double() - layer.weight.double()
        exact = ((delta @ layer.gram64) * delta).sum(1)
        torch.testing.assert_close(solution.row_error, exact, rtol=1e-3, atol=1e-3 * float(exact.max()))


def test_sparsegpt_solves_wide_weights_as_if_alone():
    assert_as_alone(SparseGPT(), [make_layer(6, 320, 400, seed, torch.bfloat16) for seed in range(2)], NM(2, 4))


def test_gate_and_up_share_a_factor(monkeypatch):
    """Which is computed once, whether they are solved in one call or one after the other."""
    layers, calls = experts(3), []
    factor = torch.ops.sparsekern.reverse_cholesky
    monkeypatch.setattr(reverse_cholesky, "_op", lambda gram, damping: calls.append(tuple(gram.shape)) or factor(gram, damping))
    statistics = [layer.statistics() for layer in layers]
    weights = [weight for layer in layers for weight in (layer.weight, layer.weight.flip(0))]
    pairs = SparseGPT().solve_many(weights, [own for own in statistics for _ in range(2)], NM(2, 4))
    ups = SparseGPT().solve_many(weights[1::2], statistics, NM(2, 4))
    assert calls == [(3, 64, 64)]
    for index, layer in enumerate(layers):
        alone = [SparseGPT().solve(weight, layer.statistics(), NM(2, 4)).weight for weight in weights[2 * index : 2 * index + 2]]
        assert torch.equal(pairs[2 * index].weight, alone[0]) and torch.equal(pairs[2 * index + 1].weight, alone[1])
        assert torch.equal(ups[index].weight, alone[1])


def test_as_many_at_once_as_copies_fit(monkeypatch):
    layers, calls = experts(5), []
    factor = torch.ops.sparsekern.reverse_cholesky
    monkeypatch.setattr(reverse_cholesky, "_op", lambda gram, damping: calls.append(len(gram)) or factor(gram, damping))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for least, most, expected in ((3, 5, [2, 2]), (1, 5, [2, 2]), (1, 1, []), (4, 0, [4])):
        monkeypatch.setattr(sparsegpt, "COPIED_BYTES", least * 64 * 64 * 4)
        monkeypatch.setattr(sparsegpt, "MOST_COPIED_BYTES", most * 64 * 64 * 4)
        calls.clear()
        assert_as_alone(SparseGPT(), layers[:4], NM(2, 4))
        assert [count for count in calls if count < 64] == expected  # 64: a Gram matrix by itself


def test_matrices_that_leave_the_caches_are_solved_one_after_another(monkeypatch):
    calls, factor = [], torch.ops.sparsekern.reverse_cholesky
    monkeypatch.setattr(reverse_cholesky, "_op", lambda gram, damping: calls.append(gram.dim()) or factor(gram, damping))
    for widest, expected in ((64, [3]), (63, [2, 2, 2])):
        monkeypatch.setattr(sparsegpt, "WIDEST_SHARED", widest)
        calls.clear()
        layers = experts(3)
        SparseGPT().solve_many([layer.weight for layer in layers], [layer.statistics() for layer in layers], NM(2, 4))
        assert calls == expected


@contextmanager
def named(index: int) -> Iterator[None]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except ValueError as error:
        raise ValueError(f"expert {index}: {error}") from error
    for warning in caught:
        warnings.warn(f"expert {index}: {warning.message}", stacklevel=2)


def test_a_warning_is_given_in_the_context_of_its_weight():
    layers = experts(3)
    statistics = [layer.statistics() for layer in layers]
    statistics[1].gram.diagonal()[:1] = -0.01 * float(statistics[1].gram.diagonal().mean())
    with pytest.warns(UserWarning) as caught:
        SparseGPT().solve_many([layer.weight for layer in layers], statistics, NM(2, 4), named)
    assert all(str(warning.message).startswith("expert 1: gram: not positive definite") for warning in caught) and caught


def test_an_error_is_raised_in_the_context_of_its_weight():
    layers = experts(3)
    layers[2].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^expert 2: weight: expected finite values, got nan at \[3, 5\]"):
        SparseGPT().solve_many([layer.weight for layer in layers], [layer.statistics() for layer in layers], NM(2, 4), named)


def test_neighbours_in_memory_are_stacked_without_a_copy():
    fused = torch.randn(4, 6, 8)
    batch = stacked([fused[index] for index in range(1, 4)])
    assert torch.equal(batch, fused[1:]) and batch.data_ptr() == fused[1].data_ptr()
    for apart in (
        [fused[0], fused[2]],
        [fused[1], fused[0]],
        [fused[0], fused[1].clone()],
        [fused[0, :3], fused[1, :3]],
        [fused[0].T, fused[1].T],
    ):
        copied = stacked(apart)
        assert all(torch.equal(*pair) for pair in zip(copied, apart, strict=True)) and copied.data_ptr() != apart[0].data_ptr()


def test_copies_are_put_into_the_same_memory():
    staging, matrices = Staging(), [torch.randn(3, 5) for _ in range(5)]
    first = staging.stacked(matrices[:3])
    again = staging.stacked(matrices[3:])
    assert torch.equal(again, torch.stack(matrices[3:])) and again.data_ptr() == first.data_ptr()
    assert torch.equal(staging.stacked(matrices), torch.stack(matrices))
    assert staging.stacked([again[0], again[1]]).data_ptr() == again.data_ptr()
