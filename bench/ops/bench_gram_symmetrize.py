from __future__ import annotations

from sparsekern.ops import gram_symmetrize_

from ..inputs import same
from ..problem import Case, Place, Problem

ADDED = "tril() + tril(-1).T"


def symmetrize(place: Place, features: int) -> Problem:
    given = [place.randn(features, features) for _ in place.copies(4 * features**2)]
    lower = given[0].tril()
    return Problem(
        calls=[lambda w=w: gram_symmetrize_(w) for w in given],
        check=same(lambda: lower + lower.tril(-1).T),
        baselines={ADDED: [lambda w=w: w.tril() + w.tril(-1).T for w in given]},
        read=given[0].nbytes // 2,
        written=given[0].nbytes // 2,
    )


CASES = [
    Case(
        "gram_symmetrize_ 4096",
        symmetrize,
        {"features": 4096},
        {"features": 128},
        op="gram_symmetrize_",
        cpu={ADDED: None},
        cuda={ADDED: None},
    )
]


def test_gram_symmetrize(timed, case):
    timed(case)
