from __future__ import annotations

import torch

from sparsekern.ops import plain_split
from sparsekern.ops.plain_split import reference

from ..inputs import CHECKED, short
from ..problem import Case, Place, Problem

SAME = "the same in PyTorch"


def split(place: Place, tokens: int, features: int, dtype: torch.dtype) -> Problem:
    p, m = (place.randn(tokens, features, dtype=dtype) for _ in range(2))

    def check(found: torch.Tensor) -> None:
        torch.testing.assert_close(found[:CHECKED].cpu(), reference(*(v[:CHECKED].cpu() for v in (p, m, m)), "relu"))

    return Problem(
        calls=[lambda: plain_split(p, m, m, "relu")],
        check=check,
        baselines={SAME: [lambda: reference(p, m, m, "relu")]},
        read=2 * p.nbytes,
        written=p.nbytes,
    )


def case(tokens: int, features: int, dtype: torch.dtype, **where) -> Case:
    sizes = {"tokens": tokens, "features": features, "dtype": dtype}
    name = f"plain_split, ReLU [{tokens}, {features}] {short(dtype)}"
    return Case(name, split, sizes, {"tokens": 32, "features": 48}, op="plain_split", rounds=3, **where)


CASES = [
    case(4096, 4096, torch.float32, cpu={SAME: None}),
    case(4096, 4096, torch.bfloat16, cpu={SAME: None}),
    case(8192, 16384, torch.bfloat16, cuda={SAME: None}),
]


def test_plain_split(timed, case):
    timed(case)
