"""The loop of obs_sweep over blocks, with what is done inside a block written in PyTorch."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.backends import obs_sweep, sweep_kernels
from sparsekern.backends.obs_sweep import block_size_for, by_halves, sweep
from sparsekern.backends.sweep_kernels import MAX_WARPS, ROWS_PER_WARP, CudaKernels, warps_for
from sparsekern.backends.sweep_state import LAUNCH_COLUMNS, column_blocks
from sparsekern.ops._registry import OPS
from sparsekern.ops.obs_sweep import reference


@given(count=st.integers(1, 70), together=st.sampled_from([1, 2, 8]))
def test_by_halves_reaches_each_pair_once_and_in_time(count, together):
    reached, done = set(), []

    def run(first, last):
        assert first == len(done) and 0 < last - first <= together
        for i in range(first, last):
            assert all((k, i) in reached for k in range(first))
            reached.update((k, i) for k in range(first, i))
            done.append(i)

    def update(first, middle, last):
        assert first < middle == len(done) < last <= count
        pairs = {(k, i) for k in range(first, middle) for i in range(middle, last)}
        assert not pairs & reached
        reached.update(pairs)

    by_halves(count, run, update, together)
    assert len(done) == count and len(reached) == count * (count - 1) // 2


def test_by_halves_makes_one_update_a_block_and_most_of_them_small():
    widths = []
    by_halves(32, lambda first, last: None, lambda first, middle, last: widths.append(last - middle))
    assert len(widths) == 31 and sorted(widths, reverse=True)[:7] == [16, 8, 8, 4, 4, 4, 4]


@given(columns=st.integers(0, 400), size=st.integers(1, 300), alignment=st.sampled_from([1, 4]))
def test_blocks_cover_the_columns_and_begin_where_they_may(columns, size, alignment):
    blocks = column_blocks(columns, size, alignment)
    assert [j for block in blocks for j in range(block.begin, block.end)] == list(range(columns))
    borders = [0, *(block.border for block in blocks)]
    for block, border in zip(blocks, borders, strict=False):
        assert block.first == border and border % alignment == 0
        assert block.last - block.first == block.end - block.begin <= size
        assert 0 <= block.border - block.last < alignment


@pytest.mark.parametrize("m", range(65))
def test_a_block_is_whole_groups_that_one_launch_takes(m):
    size = block_size_for(m, 300, competing=False)
    assert LAUNCH_COLUMNS // 2 < size <= LAUNCH_COLUMNS and (m == 0 or size % m == 0)
    assert size % 4 == 0 or (m % 2 and 4 * m > LAUNCH_COLUMNS) or 2 * m > LAUNCH_COLUMNS // 2


def test_where_weights_compete_a_block_is_the_callers():
    assert block_size_for(0, 300, competing=True) == 300 and block_size_for(0, 7, competing=True) == 7


@pytest.mark.parametrize(("rows", "warps"), [(1, 1), (128, 1), (1024, 2), (2048, 4), (4096, 8), (11008, 8), (28672, 8)])
def test_thread_blocks_for_an_h200(rows, warps):
    assert warps_for(rows, processors=132) == warps


@given(rows=st.integers(1, 100_000), processors=st.integers(1, 200))
def test_few_multiprocessors_idle_while_others_have_rows_to_give_away(rows, processors):
    warps = warps_for(rows, processors)
    blocks = -(-rows // (ROWS_PER_WARP * warps))
    assert warps in (1, 2, 4, MAX_WARPS) and (warps == 1 or 2 * blocks > processors)


DEFAULTS = {
    name: known.default for name, known in OPS["obs_sweep"].signature.parameters.items() if known.default is not known.empty
}


class PlainKernels:
    """One column after the other. Cannot choose the best of more than a group."""

    def __init__(self, state):
        self.state = state

    def check_values(self):
        self.state.status.fill_(not self.state.factor.isfinite().all())

    def prune_best(self, first, last, kept, scope):
        return False

    def together(self, choice):
        return 1

    def score(self, first, last, origin, delta, scores):
        assert first % 4 == 0 and 0 < last - first <= LAUNCH_COLUMNS
        here = slice(first - origin, last - origin)
        now = self._run(first, last, delta[:, here], torch.ones_like(delta[:, here], dtype=torch.bool))
        scores[:, here] = now.abs() * self.state.factor.diagonal()[first:last].clamp_min(0)

    def prune(self, first, last, n, m):
        assert first % 4 == 0 and 0 < last - first <= LAUNCH_COLUMNS
        state, factor = self.state, self.state.factor
        for a in range(first, last, m or last):
            b = min(a + m, last) if m else last
            if m:
                state.delta[:, a:b] += state.delta[:, first:a] @ factor[first:a, a:b]
                scores = torch.empty_like(state.delta[:, a:b])
                self.score_group(a, b, state.delta[:, a:b].clone(), scores)
                order = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
                state.mask[:, a:b] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
            now = self._run(a, b, state.delta[:, a:b], state.mask[:, a:b])
            alive = ~torch.signbit(factor.diagonal()[a:b])
            state.new_weight[:, a:b] = torch.where(state.mask[:, a:b] & alive, now, 0.0)
            cost = torch.where(state.mask[:, a:b], 0.0, now) * factor.diagonal()[a:b]
            state.row_error.add_((cost * alive).square().sum(1))

    def score_group(self, a, b, delta, scores):
        now = self._run(a, b, delta, torch.ones_like(delta, dtype=torch.bool))
        scores.copy_(now.abs() * self.state.factor.diagonal()[a:b].clamp_min(0))

    def _run(self, a, b, delta, mask):
        """The weights as they stood when they were reached; `delta` goes from what is pending to their change."""
        now = torch.zeros_like(delta)
        for j in range(b - a):
            pending = delta[:, j] + delta[:, :j] @ self.state.factor[a : a + j, a + j]
            diagonal, start = self.state.factor[a + j, a + j], self.state.weight[:, a + j].float()
            if diagonal > 0:
                now[:, j] = start + pending / diagonal
            delta[:, j] = start - torch.where(mask[:, j], now[:, j], 0.0) if diagonal > 0 else 0.0
        return now


class PlainKernelsOfABatch:
    """Those of each weight, one after another."""

    def __init__(self, state):
        names = "weight", "factor", "mask", "delta", "new_weight", "row_error"
        each = [{name: getattr(state, name)[index] for name in names} for index in range(len(state.weight))]
        self.each = [PlainKernels(dataclasses.replace(state, **views)) for views in each]

    def check_values(self):
        for kernels in self.each:
            kernels.check_values()

    def prune_best(self, first, last, kept, scope):
        return False

    def together(self, choice):
        return 1

    def score(self, first, last, origin, delta, scores):
        for index, kernels in enumerate(self.each):
            kernels.score(first, last, origin, delta[index], scores[index])

    def prune(self, first, last, n, m):
        for kernels in self.each:
            kernels.prune(first, last, n, m)


@pytest.mark.parametrize("columns", [24, 150, 300])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.3, "block_size": 33},
        {"sparsity": 0.6, "block_size": 290},
        {"sparsity": 0.6, "block_size": 290, "scope": "row"},
        {"sparsity": 0.5, "scope": "matrix"},
        {"n": 2, "m": 3},
        {"n": 1, "m": 6},
        {"mask": True},
    ],
    ids=str,
)
def test_the_loop_around_plain_kernels_is_the_reference(generator, columns, options):
    x = torch.randn(2 * columns, columns, generator=generator)
    factor = torch.linalg.cholesky((x.T @ x).flip(0, 1)).flip(0, 1).contiguous()
    factor[5, :], factor[:, 5], factor[5, 5] = 0, 0, -1
    weight = torch.randn(11, columns, generator=generator)
    if options.get("mask"):
        options = {"mask": torch.rand(11, columns, generator=generator) > 0.5}
    got = sweep(PlainKernels, weight, factor, **{**DEFAULTS, **options})
    expected = reference(weight.double(), factor, **options)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.6, "block_size": 33}, {"sparsity": 0.6, "block_size": 33, "scope": "row"}, {"sparsity": 0.5, "scope": "matrix"}, {"n": 2, "m": 3}, {"mask": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("columns", [24, 90])
def test_the_weights_of_a_batch_go_through_the_loop_as_each_would_alone(generator, columns, options):
    x = torch.randn(3, 2 * columns, columns, generator=generator)
    factors = torch.linalg.cholesky((x.mT @ x).flip(1, 2)).flip(1, 2).contiguous()
    factors[1, 5, :], factors[1, :, 5], factors[1, 5, 5] = 0, 0, -1
    weights = torch.randn(3, 11, columns, generator=generator)
    if options.get("mask"):
        options = {"mask": torch.rand(3, 11, columns, generator=generator) > 0.5}
    got = sweep(PlainKernelsOfABatch, weights, factors, **{**DEFAULTS, **options})
    for index in range(3):
        own = {name: value[index] if name == "mask" else value for name, value in options.items()}
        expected = reference(weights[index].double(), factors[index], **own)
        assert torch.equal(got[1][index], expected[1])
        torch.testing.assert_close(got[0][index].double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[2][index], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"sparsity": 0.5}, 3 * 1300),
        ({"sparsity": 0.5, "scope": "row"}, 1300),
        ({"n": 2, "m": 4}, 2 * 21),
        ({"mask": torch.ones(3, 2600, dtype=torch.bool)}, 0),
    ],
    ids=["block", "row", "group", "given"],
)
def test_a_call_takes_eight_blocks(monkeypatch, generator, options, kept):
    """The host multiplies only between the ranges of two calls."""
    ranges, products = [], []
    ops = types.SimpleNamespace(
        obs_sweep_check_factor=lambda factor, status: None,
        obs_sweep_workspace=lambda weight, calls: (torch.zeros(calls, 1), torch.zeros(1), 1),
        obs_sweep_blocks=lambda *given: ranges.append((*given[7:10], None, given[-1])),
        obs_sweep_competing_blocks=lambda *given: ranges.append((*given[9:12], given[-2], given[-1])),
    )
    monkeypatch.setattr(torch.ops, "sparsekern_cuda", ops, raising=False)
    monkeypatch.setattr(sweep_kernels, "is_built", lambda op: True)
    monkeypatch.setattr(obs_sweep, "add_product", lambda out, left, right, begins: products.append((out.shape[1], begins)))
    sweep(CudaKernels, torch.randn(3, 2600, generator=generator), torch.eye(2600), **{**DEFAULTS, **options})
    borders, ends, of_blocks, calls, fresh = zip(*ranges, strict=True)
    assert [(each[0], each[-1]) for each in borders] == [(0, 1024), (1024, 2048), (2048, 2600)]
    assert [each[-1] for each in ends] == [1024, 2048, 2600] and list(map(len, ends)) == [8, 8, 5]
    competing = options == {"sparsity": 0.5}  # among all rows
    assert fresh == (True, False, False) and calls == ((0, 8, 16) if competing else (None,) * 3)
    assert sum(map(sum, of_blocks)) == kept and products == [(1024, True), (552, True)]
