from __future__ import annotations

import torch

from sparsekern.ops import nm_experts_linear, nm_pack

from ..inputs import n_of_m
from ..problem import Case
from .bench_bitmask_experts_linear import FEW, GATHERED, LOOP, MANY, SHAPE, SOME, TOY, Product, product


def as_two_of_four(weight: torch.Tensor) -> tuple[Product, int]:
    experts, rows, columns = weight.shape
    packed = nm_pack(weight.view(experts * rows, columns), 2, 4)
    values, codes = (packed[name].view(experts, rows, -1) for name in ("values", "codes"))
    return lambda x, chosen: nm_experts_linear(x, chosen, values, codes, 2, 4), values.nbytes + codes.nbytes


def case(tokens: int, cpu=None, cuda=None) -> Case:
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"nm_experts_linear 2:4, {some}, 8 of 64 experts of 1536x2048 bfloat16",
        product,
        {
            "pack": as_two_of_four,
            "prune": lambda place, weight: n_of_m(weight, "2:4"),
            "tokens": tokens,
            "choices": 8,
        }
        | SHAPE,
        TOY | {"tokens": min(tokens, 12), "choices": 2},
        op="nm_experts_linear",
        cpu=cpu,
        cuda=cuda,
        rounds=41 if tokens == 1 else 5,
    )


CASES = [
    case(1, {LOOP: 1.7, GATHERED: 3.0}, FEW),
    case(16, cuda=SOME),
    case(64, {LOOP: 0.9}),
    case(512, cuda=MANY),
]


def test_nm_experts_linear(timed, case):
    timed(case)
