from __future__ import annotations

import torch
from torch.nn.functional import linear

from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.ops import nm_q4_linear, nm_q4_pack, nm_q4_unpack

from ..inputs import n_of_m, short
from ..problem import Case, Place, Problem
from .bench_bitmask_linear import DENSE, SHAPES, TOY


def packed_weight(place: Place, n: int, m: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random weight that 4 bits hold, and its blocks."""
    dense = n_of_m(place.randn(rows, columns) / columns**0.5, f"{n}:{m}")
    scales = (dense.view(rows, -1, COLUMNS).abs().amax(-1) / 7).half()
    blocks = nm_q4_pack(dense, scales, n, m)
    return nm_q4_unpack(blocks, n, m, rows, columns)[0], blocks


def product(place: Place, n: int, m: int, rows: int, columns: int, tokens: int) -> Problem:
    """A product with a packed weight in bfloat16; copies of the layer take turns, so that no call finds its weight in a cache."""
    weight, blocks = packed_weight(place, n, m, rows, columns)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    dense = [weight.bfloat16() for _ in place.copies(2 * weight.numel())]

    def check(result: torch.Tensor) -> None:
        """Near the float64 product of some tokens: activations have 8 bits."""
        exact = x[:64].double() @ weight.double().T
        assert float((result[:64].double() - exact).norm() / exact.norm()) < 0.015

    return Problem(
        calls=[lambda b=b: nm_q4_linear(x, b, n, m, rows) for b in [blocks.clone() for _ in place.copies(blocks.nbytes)]],
        check=check,
        baselines={DENSE: [lambda w=w: linear(x, w) for w in dense]},
        flops=2 * tokens * rows * columns * n / m,
        read=blocks.nbytes + x.nbytes,
        written=2 * tokens * rows,
        unit="bf16",
    )


def case(pattern: str, tokens: int, shape: tuple[int, int], goal: float | None, device_goal: float | None = None) -> Case:
    n, m = map(int, pattern.split(":"))
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"nm_q4_linear {pattern}, {some}, {shape[0]}x{shape[1]} {short(torch.bfloat16)}",
        product,
        {"n": n, "m": m, "rows": shape[0], "columns": shape[1], "tokens": tokens},
        TOY | {"tokens": min(tokens, 40)},
        op="nm_q4_linear",
        cpu={DENSE: goal},
        cuda={DENSE: device_goal} if pattern == "2:4" and tokens <= 16 else None,
        rounds=41 if tokens == 1 else 5,
    )


CASES = [
    *(case("2:4", 1, shape, 4.0, 2.0) for shape in SHAPES),
    *(case(pattern, 1, SHAPES[0], None) for pattern in ("1:4", "4:16")),
    *(case("2:4", tokens, SHAPES[0], None) for tokens in (4, 16, 64, 512)),
]


def test_nm_q4_linear(timed, case):
    timed(case)
