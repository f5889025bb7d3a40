from __future__ import annotations

import torch

from baselines.plain import plain_linear_kl
from sparsekern.ops import linear_kl

from ..problem import Case, Place, Problem

PRODUCTS, STORED = "the three products alone", "autograd through stored logits"


def divergence(place: Place, tokens: int, words: int, features: int) -> Problem:
    head = place.randn(words, features) * 0.05
    teacher_x = place.randn(tokens, features)
    x = teacher_x + 0.3 * place.randn(tokens, features)

    def products() -> torch.Tensor:
        student = x @ head.T
        torch.mm(teacher_x, head.T)
        return student @ head

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        few = [x[:8].double(), head.double(), teacher_x[:8].double(), head.double()]
        for got, want in zip(result, plain_linear_kl(*few), strict=True):
            assert float((got[:8].double() - want).norm() / want.norm()) < 1e-4

    return Problem(
        calls=[lambda: linear_kl(x, head, teacher_x, head)],
        check=check,
        baselines={PRODUCTS: [products], STORED: [lambda: plain_linear_kl(x, head, teacher_x, head)]},
        flops=6.0 * tokens * words * features,
        read=head.nbytes + 2 * x.nbytes,
        written=x.nbytes,
        captured=False,
    )


CASES = [
    Case(
        f"linear_kl {tokens} tokens, head {words}x{features}",
        divergence,
        {"tokens": tokens, "words": words, "features": features},
        {"tokens": 20, "words": 300, "features": 32},
        op="linear_kl",
        cpu={PRODUCTS: 1 / 1.3, STORED: None} if tokens < 8192 else None,
        cuda={PRODUCTS: 1 / 1.3, STORED: None} if tokens == 8192 else None,
        rounds=3,
    )
    for tokens, words, features in [(1024, 49152, 576), (256, 128256, 2048), (8192, 128256, 4096)]
]


def test_linear_kl(timed, case):
    timed(case)
