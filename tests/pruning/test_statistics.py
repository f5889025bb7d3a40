"""Which linears share a statistic, and what a Gram matrix is asked for."""

import pytest
import torch
from torch import nn

from sparsekern.methods.statistics import FeatureNorm, Gram
from sparsekern.models import find_linears
from sparsekern.pruning.batches import DECODED, TOKENS, Batch, fingerprint
from sparsekern.pruning.blockwise.statistics import SharedStatistics


def batch_of(tokens: int) -> Batch:
    return Batch({"input_ids": torch.zeros(1, tokens, dtype=torch.long)}, 0, None)


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return find_linears(nn.ModuleDict({name: nn.Linear(6 if name == "d" else 4, 3) for name in "abcd"}))


def groups(shared: SharedStatistics) -> list[set[str]]:
    return sorted(({linear.name for linear in members} for members, _ in shared.groups), key=min)


@pytest.mark.parametrize("needs", [Gram, FeatureNorm])
def test_the_same_tensor_is_shared_and_a_copy_is_not(linears, needs):
    shared, x, y = SharedStatistics(linears, needs), torch.randn(1, 5, 4), torch.randn(1, 5, 6)
    shared.add(batch_of(5), {"a": [x], "b": [x.view(1, 5, 4)], "c": [x.clone()], "d": [y]})
    assert groups(shared) == [{"a", "b"}, {"c"}, {"d"}]
    for members, statistic in shared.groups:
        expected = (y if members[0].name == "d" else x)[0].square().sum(0)
        torch.testing.assert_close(statistic.sum_squares, expected)
        assert statistic.tokens == 5


@pytest.mark.parametrize("needs", [Gram, FeatureNorm])
def test_linears_that_part_later_keep_what_they_had_in_common(linears, needs):
    shared, xs = SharedStatistics(linears, needs), [torch.randn(1, 5, 4) for _ in range(3)]
    y = torch.randn(1, 5, 6)
    shared.add(batch_of(5), {"a": [xs[0]], "b": [xs[0]], "c": [xs[0]], "d": [y]})
    assert groups(shared) == [{"a", "b", "c"}, {"d"}]
    shared.add(batch_of(5), {"a": [xs[1]], "b": [xs[2]], "c": [xs[1]], "d": [y]})
    shared.add(batch_of(5), {"a": [xs[1]], "b": [xs[1]], "c": [xs[1]], "d": [y]})
    assert groups(shared) == [{"a", "c"}, {"b"}, {"d"}]
    found = {members[0].name: statistic.sum_squares for members, statistic in shared.groups}
    squares = [x[0].square().sum(0) for x in xs]
    torch.testing.assert_close(found["a"], squares[0] + 2 * squares[1])
    torch.testing.assert_close(found["b"], squares[0] + squares[2] + squares[1])


def test_gram_factor_is_computed_once_and_again_after_new_data(monkeypatch):
    from sparsekern import ops

    calls, plain = [], ops.reverse_cholesky
    monkeypatch.setattr(ops, "reverse_cholesky", lambda gram, damping: calls.append(damping) or plain(gram, damping))
    gram = Gram(8, torch.device("cpu"))
    gram.add(torch.randn(30, 8), None)
    first = gram.factor(0.01)
    assert gram.factor(0.01) is first and calls == [0.01]
    gram.factor(0.1)
    gram.add(torch.randn(30, 8), None)
    gram.factor(0.1)
    assert calls == [0.01, 0.1, 0.1]


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("dead", [False, True])
def test_shift_and_energy_are_those_of_the_undamped_matrix(damping, dead):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 24) * torch.logspace(-1, 2, 24), torch.randn(5, 24)
    if dead:
        x[:, 7] = 0
    gram = Gram(24, x.device)
    gram.add(x, None)
    factor = gram.factor(damping)
    exact = x.double().T @ x.double()
    mean = float(exact.diagonal().mean())
    assert gram.shift == pytest.approx(damping * mean, rel=1e-4, abs=1e-6 * mean)
    assert (gram.factor(damping) is factor) and torch.equal(gram.sum_squares, gram._gram.diagonal())
    expected = (weight.double() @ exact * weight.double()).sum(1)
    torch.testing.assert_close(gram.row_energy(weight), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [Gram, FeatureNorm])
def test_masked_rows_are_not_seen(make):
    x = torch.randn(10, 4)
    x[3] = float("nan")
    mask = torch.ones(10, dtype=torch.bool)
    mask[3] = False
    statistic = make(4, x.device)
    statistic.add(x, mask)
    assert statistic.tokens == 9
    torch.testing.assert_close(statistic.sum_squares, x[mask].square().sum(0))


def test_rows_of_a_batch_and_their_samples():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, 6, mask)
    for shape in ((2, 3, 4), (6, 4)):
        rows, row_mask = batch.flatten(torch.randn(shape))
        assert rows.shape == (6, 4) and torch.equal(row_mask, mask.flatten())
    rows, row_mask = batch.flatten(torch.randn(2, 3, 5, 4))  # five heads a token
    assert torch.equal(row_mask, mask.flatten().repeat_interleave(5))
    assert batch.tokens == 3
    assert [batch.sample_of_row(row, 6) for row in (0, 2, 3, 5)] == [6, 6, 7, 7]
    assert batch.sample_of_row(14, 30) == 6 and batch.sample_of_row(15, 30) == 7
    assert batch.sample_of_row(1, 5) is None


def test_each_call_of_a_linear_has_its_own_padding_mask():
    """A linear that is called on the tokens of an encoder, then twice on those of a decoder, which are padded otherwise."""
    (linear,) = find_linears(nn.ModuleDict({"a": nn.Linear(4, 3)}))
    tokens, decoded = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, 0, tokens, decoded)
    shared = SharedStatistics([linear], FeatureNorm, masks={"a": (TOKENS, DECODED)})
    calls = [torch.randn(2, 3, 4) for _ in range(3)]
    shared.add(batch, {"a": calls})
    ((_, statistic),) = shared.groups
    seen = torch.cat([calls[0][tokens], calls[1][decoded], calls[2][decoded]])
    assert statistic.tokens == len(seen) == 11
    torch.testing.assert_close(statistic.sum_squares, seen.square().sum(0))


def test_the_sample_that_is_named_is_the_first_bad_one_that_is_not_padding(linears):
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    batch = Batch({"input_ids": torch.zeros(3, 3, dtype=torch.long)}, 4, mask)
    x = torch.zeros(3, 3, 4)
    x[0, 1] = float("nan")
    x[1, 1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"^a: its input is inf in calibration sample 5 \(row 4 of the batch\)"):
        SharedStatistics(linears[:1], FeatureNorm).add(batch, {"a": [x]})


def test_the_shape_of_samples_is_part_of_their_fingerprint():
    ids = torch.arange(16)
    assert len({fingerprint([Batch({"input_ids": ids.view(shape)}, 0, None)]) for shape in ((2, 8), (4, 4), (1, 16))}) == 3
