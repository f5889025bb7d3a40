"""Scores of experts: the papers' formulas in float64, and the experts that go."""

import pytest
import torch

import sparsekern
from sparsekern import ExpertPruning
from sparsekern.methods import ExpertSums

DATA = torch.Generator().manual_seed(0)
OUTPUTS = [torch.randn(tokens, 6, generator=DATA) for tokens in (3, 1, 0, 5)]
WEIGHTS = [torch.rand(len(outputs), generator=DATA) for outputs in OUTPUTS]


def sums() -> ExpertSums:
    found = ExpertSums.zeros(4, torch.device("cpu"))
    for expert, (outputs, weights) in enumerate(zip(OUTPUTS, WEIGHTS, strict=True)):
        for rows in (slice(0, 2), slice(2, None)):  # batch by batch
            if len(outputs[rows]):
                found.add(expert, outputs[rows], weights[rows])
    return found


def lengths(expert: int) -> list[float]:
    return [sum(value**2 for value in row) ** 0.5 for row in OUTPUTS[expert].tolist()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


PLAIN = {
    "reap": lambda e: mean([g * n for g, n in zip(WEIGHTS[e].tolist(), lengths(e), strict=True)]),
    "man": lambda e: mean(lengths(e)),
    "msan": lambda e: mean([n**2 for n in lengths(e)]),
    "frequency": lambda e: float(len(OUTPUTS[e])),
    "activation": lambda e: sum(lengths(e)),
}


@pytest.mark.parametrize("score", PLAIN)
def test_scores_are_the_formulas(score):
    found = ExpertPruning(score=score).scores(sums())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([PLAIN[score](e) for e in range(4)], dtype=torch.float64))


def test_the_lowest_go_and_of_equal_scores_the_first_stays():
    method = ExpertPruning()
    assert method.kept(torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist() == [0, 2]
    assert method.kept(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2).tolist() == [0, 1]
    assert method.kept(torch.zeros(4), 3).tolist() == [0, 1, 2]


def test_each_group_keeps_equally_many():
    scores = torch.tensor([9.0, 8.0, 7.0, 3.0, 2.0, 1.0])
    assert ExpertPruning().kept(scores, 4, groups=2).tolist() == [0, 1, 3, 4]
    assert ExpertPruning().kept(scores, 4, groups=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("remove", "experts", "groups", "left"),
    [(0.25, 8, 1, 6), (0.25, 16, 4, 12), (0.3, 8, 1, 6), (0.5, 7, 1, 3), (0.5, 3, 1, 1), (0.2, 64, 8, 48), (0.9, 10, 1, 1)],
)
def test_how_many_stay(remove, experts, groups, left):
    assert ExpertPruning(remove=remove).left(experts, groups) == left


@pytest.mark.parametrize(
    ("remove", "experts", "groups", "message"),
    [
        (0.01, 8, 1, "ExpertPruning.remove: expected a share that removes some of 8 experts, got 0.01, which removes none"),
        (0.99, 8, 1, "ExpertPruning.remove: expected a share that removes some of 8 experts, got 0.99, which removes all"),
        (0.1, 8, 4, "some of 2 experts in each of 4 groups, got 0.1, which removes none"),
    ],
)
def test_a_share_that_removes_none_or_all(remove, experts, groups, message):
    with pytest.raises(ValueError, match=message):
        ExpertPruning(remove=remove).left(experts, groups)


@pytest.mark.parametrize("remove", [0, 1, -0.5, 1.5, float("nan"), "0.5", None, True])
def test_a_share_outside_of_zero_and_one(remove):
    with pytest.raises(ValueError, match="ExpertPruning.remove: expected a number above 0 and below 1, got"):
        sparsekern.ExpertPruning(remove=remove)


def test_an_unknown_score():
    with pytest.raises(
        ValueError, match="ExpertPruning.score: expected one of 'reap', 'man', 'msan', 'frequency', 'activation', got 'l2'"
    ):
        ExpertPruning(score="l2")
