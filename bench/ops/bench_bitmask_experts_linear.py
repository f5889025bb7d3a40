from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import grouped_mm, linear

from sparsekern.layouts.packed_experts import join_bitmask_experts
from sparsekern.ops import bitmask_experts_linear, bitmask_pack

from ..problem import Case, Place, Problem
from .bench_bitmask_linear import random_zeros

LOOP, GATHERED = "F.linear, one expert after another", "gathered weights, torch.bmm"
GROUPED = "sorted tokens, one grouped product"
SHAPE = {"experts": 64, "rows": 1536, "columns": 2048}  # gate and up of Qwen3-30B-A3B, and half of its experts
TOY = {"experts": 4, "rows": 48, "columns": 128}
FEW, SOME, MANY = {GROUPED: 1.0, GATHERED: 1.0}, {GROUPED: 1.0}, {GROUPED: None}  # goals on a device
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def product(
    place: Place,
    pack: Callable[[torch.Tensor], tuple[Product, int]],
    prune: Callable[[Place, torch.Tensor], torch.Tensor],
    experts: int,
    rows: int,
    columns: int,
    tokens: int,
    choices: int,
) -> Problem:
    """A product with the experts of each token; calls take turns with other experts, so that few find theirs in a cache."""
    weight = torch.stack([prune(place, place.randn(rows, columns) / columns**0.5).bfloat16() for _ in range(experts)])
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    packed, nbytes = pack(weight)
    chosen = [(place.rand(tokens, experts).argsort(1)[:, :choices] + shift * choices) % experts for shift in range(8)]

    def check(result: torch.Tensor) -> None:
        """Within twice the rounding of one output from the float64 product of some tokens."""
        for token in range(min(tokens, 4)):
            exact = weight[chosen[0][token]].double() @ x[token].double()
            tolerance = {"rtol": 2 * torch.finfo(torch.bfloat16).eps, "atol": 1e-4 * float(exact.abs().max())}
            torch.testing.assert_close(result[token].double(), exact, **tolerance)

    hit = len(chosen[0].unique())
    return Problem(
        calls=[lambda c=c: packed(x, c) for c in chosen],
        check=check,
        baselines={
            LOOP: [lambda c=c: loop(x, c, weight) for c in chosen],
            GATHERED: [lambda c=c: gathered(x, c, weight) for c in chosen],
            GROUPED: [lambda c=c: grouped(x, c, weight) for c in chosen],
        },
        flops=2 * tokens * choices * int(weight.count_nonzero()) / experts,
        read=nbytes * hit / experts + x.nbytes,
        written=tokens * choices * rows * x.element_size(),
        unit="bf16",
    )


def loop(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.new_empty((*experts.shape, weight.shape[1]))
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        y[token, choice] = linear(x[token], weight[expert])
    return y


def gathered(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.repeat_interleave(experts.shape[1], 0)
    return torch.bmm(weight[experts.flatten()], rows.unsqueeze(-1)).view(*experts.shape, weight.shape[1])


def grouped(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as transformers' own implementation for a GPU does, without waiting for the device."""
    ids, pairs = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(1, len(weight) + 1, device=ids.device)).int()
    y = x.new_empty((len(pairs), weight.shape[1]))
    y[pairs] = grouped_mm(x[pairs // experts.shape[1]], weight.mT, offs=ends)
    return y.view(*experts.shape, -1)


def as_bitmask(weight: torch.Tensor) -> tuple[Product, int]:
    packed = join_bitmask_experts([bitmask_pack(own) for own in weight], weight.shape[1:], weight.dtype)
    return lambda x, experts: bitmask_experts_linear(x, experts, **packed), sum(tensor.nbytes for tensor in packed.values())


def case(zeros: float, tokens: int, cpu=None, cuda=None) -> Case:
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"bitmask_experts_linear {zeros:.0%} zeros, {some}, 8 of 64 experts of 1536x2048 bfloat16",
        product,
        {"pack": as_bitmask, "prune": random_zeros(zeros), "tokens": tokens, "choices": 8} | SHAPE,
        TOY | {"tokens": min(tokens, 12), "choices": 2},
        op="bitmask_experts_linear",
        cpu=cpu,
        cuda=cuda,
        rounds=41 if tokens == 1 else 5,
    )


CASES = [
    case(0.5, 1, {LOOP: 1.7, GATHERED: 3.0}, FEW),
    case(0.5, 16, cuda=SOME),
    case(0.5, 64, {LOOP: 0.9}),
    case(0.5, 512, cuda=MANY),
]


def test_bitmask_experts_linear(timed, case):
    timed(case)
