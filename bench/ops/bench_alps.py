"""A layer by ALPS, from weight and Gram matrix to pruned weight, against the public program and against a plain prototype in torch."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ALPS
from sparsekern.pattern import parse_pattern
from sparsekern.pruning.blockwise.statistics import Gram
from tests.textbook import textbook_alps

from ..problems import DAMPING, conjugate_gradients, gram_of, output_error

TEXTBOOK = {"2:4": {"n_kept": 2, "m": 4}, 0.5: {"sparsity": 0.5}}
SHAPES = ((1536, 576), (4096, 4096))
LARGE = 2000  # features
NO_WORSE = 1.002  # times the baseline's error


def statistics_of(gram: torch.Tensor) -> Gram:
    statistics = Gram(len(gram), gram.device)
    statistics.gram.copy_(gram.tril())
    return statistics


def alps(weight: torch.Tensor, gram: torch.Tensor, pattern) -> torch.Tensor:
    return ALPS(damping=DAMPING).solve(weight, statistics_of(gram), parse_pattern(pattern)).weight


def public(weight: torch.Tensor, gram: torch.Tensor, pattern) -> torch.Tensor:
    """The public program: eigenvectors in float64, sorts, three products an iteration of conjugate gradients, unused traces."""
    return textbook_alps(weight, gram, damping=DAMPING, **TEXTBOOK[pattern])[0]


def prototype(weight: torch.Tensor, gram: torch.Tensor, pattern) -> torch.Tensor:
    """The same algorithm in plain torch without what the public program wastes: a Cholesky inverse for each penalty, `kthvalue` or
    a top-k of groups for the projection, one product an iteration of conjugate gradients."""
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    scale = gram.diagonal().sqrt()
    gram, target = gram / scale / scale[:, None], weight * scale

    def project(z: torch.Tensor) -> torch.Tensor:
        size = z.abs()
        if pattern == "2:4":
            groups = size.view(-1, 4)
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True).view_as(z)
        return size > torch.kthvalue(size.flatten(), int(pattern * z.numel())).values

    def inverse(rho: float) -> torch.Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(gram + rho * torch.eye(len(gram))))

    rho, mask, dual = 0.1, project(target), torch.zeros_like(target)
    kept, seen, sparse, step = int(mask.sum()), mask, target * mask, inverse(0.1)
    for iteration in range(300):
        dense = target - rho * ((target - sparse + dual) @ step)
        z = dense + dual
        mask = project(z)
        sparse = z * mask
        dual = z - sparse
        if iteration % 3 == 2:
            changed, seen = int((mask != seen).sum()) / kept, mask
            if changed == 0 or (iteration >= 30 and changed < 3e-4):
                break
            growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            dual, rho = dual / growth, rho * growth
            step = inverse(rho)
    mask = project(dense)
    return conjugate_gradients(target, gram, mask, start=dense) / scale


BASELINES = {"public": (public, 3.0), "prototype": (prototype, 1.5)}


class Last:
    """A function, and what it returned the last time: at the large size every run takes long, so the timed ones are the ones checked."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments, self.result = function, arguments, None

    def __call__(self) -> None:
        self.result = self.function(*self.arguments)


def assert_no_worse(weight: torch.Tensor, gram: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, pattern) -> None:
    assert int((ours != 0).sum()) <= int(weight.numel() * 0.5)
    assert output_error(weight, ours, gram) < NO_WORSE * output_error(weight, theirs, gram)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("pattern", TEXTBOOK)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_prune_a_layer(measure, generator, rows, columns, pattern, baseline):
    against, goal = BASELINES[baseline]
    small, small_gram = torch.randn(96, 192, generator=generator), gram_of(generator, 192)
    assert_no_worse(small, small_gram, alps(small, small_gram, pattern), against(small, small_gram, pattern), pattern)
    weight, gram = torch.randn(rows, columns, generator=generator), gram_of(generator, columns)
    ours, theirs = Last(alps, weight, gram, pattern), Last(against, weight, gram, pattern)
    large = columns > LARGE
    measure(
        ours,
        against=theirs,
        baseline=baseline,
        goal=goal,
        group=f"ALPS {rows}x{columns} {pattern} against the {baseline}",
        rounds=1 if large else 3,
        warmup=not large,
    )
    if theirs.result is None:  # --benchmark-disable
        theirs()
    assert_no_worse(weight, gram, ours.result, theirs.result, pattern)
