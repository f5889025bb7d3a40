from __future__ import annotations

import torch

from sparsekern.ops import cross_gram_

from ..inputs import CHECKED, activations, assert_close, exact_product, short
from ..problem import Case, Place, Problem

PUBLIC = "float().T @ float()"


def cross_gram(place: Place, tokens: int, p: int, q: int, dtype: torch.dtype) -> Problem:
    x, y = activations(place, tokens, p, dtype), activations(place, tokens, q, dtype)
    cross = torch.zeros(p, q, device=place.device)

    def check(_) -> None:
        fresh = cross_gram_(torch.zeros_like(cross), x, y)
        assert_close(fresh[:CHECKED], exact_product(x[:, :CHECKED], y), 1e-5)

    return Problem(
        calls=[lambda: cross_gram_(cross, x, y)],
        check=check,
        baselines={PUBLIC: [lambda: cross.add_(x.float().T @ y.float())]},
        flops=2 * tokens * p * q,
        read=x.nbytes + y.nbytes + cross.nbytes,
        written=cross.nbytes,
        unit="bf16" if dtype == torch.bfloat16 else "fp32",
    )


def case(tokens: int, p: int, q: int, dtype: torch.dtype, **where) -> Case:
    name = f"cross_gram_ {short(dtype)} [{tokens}, {p}] x [{tokens}, {q}]"
    sizes = {"tokens": tokens, "p": p, "q": q, "dtype": dtype}
    return Case(name, cross_gram, sizes, {"tokens": 256, "p": 64, "q": 56}, op="cross_gram_", rounds=3, **where)


CASES = [
    case(16384, 1024, 2048, torch.float32, cpu={PUBLIC: None}),
    case(16384, 1024, 2048, torch.bfloat16, cpu={PUBLIC: None}),
    case(65536, 4096, 4096, torch.bfloat16, cuda={PUBLIC: None}),
]


def test_cross_gram(timed, case):
    timed(case)
