"""A layer by ALPS, from weight and Gram matrix to pruned weight."""

from __future__ import annotations

import torch

from baselines.plain import plain_alps
from baselines.textbook import textbook_alps
from sparsekern import ALPS
from sparsekern.methods.statistics import Gram
from sparsekern.pattern import parse_pattern

from ..inputs import DAMPING, gram_of, output_error
from ..problem import Case, Place, Problem, Turns

TEXTBOOK = {"2:4": {"n_kept": 2, "m": 4}, 0.5: {"sparsity": 0.5}}
PUBLIC, PROTOTYPE = "the public program", "a plain prototype"
NO_WORSE = 1.002  # times the baseline's error


def alps(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> torch.Tensor:
    statistics = Gram(len(gram), gram.device)
    statistics.gram.copy_(gram.tril())
    return ALPS(damping=DAMPING).solve(weight, statistics, parse_pattern(pattern)).weight


def public(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> torch.Tensor:
    return textbook_alps(weight, gram, damping=DAMPING, **TEXTBOOK[pattern])[0]


def prototype(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> torch.Tensor:
    return plain_alps(weight, gram, pattern, DAMPING)


def layer(place: Place, rows: int, columns: int, pattern: str | float) -> Problem:
    small, small_gram = place.randn(96, 192), gram_of(place, 192)
    weight, gram = place.randn(rows, columns), gram_of(place, columns)
    theirs = {
        name: Turns([lambda solve=solve: solve(weight, gram, pattern)])
        for name, solve in ((PUBLIC, public), (PROTOTYPE, prototype))
    }

    def check(ours: torch.Tensor) -> None:
        """Compares with the baselines that have run; with the prototype where none has."""
        for solve in (public, prototype):
            assert_no_worse(small, small_gram, alps(small, small_gram, pattern), solve(small, small_gram, pattern))
        timed = [each.result for each in theirs.values() if each.result is not None] or [theirs[PROTOTYPE]()]
        for result in timed:
            assert_no_worse(weight, gram, ours, result)

    return Problem(
        calls=[lambda: alps(weight, gram, pattern)],
        check=check,
        baselines={name: [call] for name, call in theirs.items()},
        captured=False,
    )


def assert_no_worse(weight: torch.Tensor, gram: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert int((ours != 0).sum()) <= int(weight.numel() * 0.5), "more than half of the weights are kept"
    error, their_error = output_error(weight, ours, gram), output_error(weight, theirs, gram)
    assert error < NO_WORSE * their_error, f"output error {error:.4g}, the baseline's is {their_error:.4g}"


CASES = [
    Case(
        f"ALPS {rows}x{columns} {pattern}",
        layer,
        {"rows": rows, "columns": columns, "pattern": pattern},
        {"rows": 64, "columns": 128},
        cpu={PUBLIC: 3.0, PROTOTYPE: 1.5},
        rounds=1 if columns > 2000 else 3,
    )
    for rows, columns in ((1536, 576), (4096, 4096))
    for pattern in TEXTBOOK
]


def test_alps(timed, case):
    timed(case)
