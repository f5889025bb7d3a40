from __future__ import annotations

import torch

from sparsekern.ops import sensitivity_

from ..inputs import CHECKED, activations, assert_close, short
from ..problem import Case, Place, Problem

FORMULA, PRODUCTS = "the formula at once in float32", "two products in the inputs' dtype"


def sensitivity(place: Place, tokens: int, rows: int, features: int, dtype: torch.dtype) -> Problem:
    x = activations(place, tokens, features, dtype)
    weight = place.randn(rows, features, dtype=dtype)
    importance = torch.zeros(rows, features, device=place.device)
    # On a GPU, outputs are rounded to the dtype of the inputs, which over the tokens cancels out.
    tolerance = 1e-5 if place.device.type == "cpu" else 1e-3

    def formula() -> torch.Tensor:
        """All outputs and the whole product are in memory."""
        w, inputs = weight.float(), x.float()
        return importance.add_(w.abs() * ((inputs @ w.T).abs().T @ inputs.abs()))

    def products() -> torch.Tensor:
        return importance.add_(weight.abs().float() * ((x @ weight.T).abs_().T @ x.abs()))

    def check(_) -> None:
        fresh = sensitivity_(torch.zeros_like(importance), weight, x)
        part, inputs = weight[:CHECKED].double(), x.double()
        assert_close(fresh[:CHECKED], part.abs() * ((inputs @ part.T).abs().T @ inputs.abs()), tolerance)

    return Problem(
        calls=[lambda: sensitivity_(importance, weight, x)],
        check=check,
        baselines={FORMULA: [formula], PRODUCTS: [products]},
        flops=4 * tokens * rows * features,
        read=x.nbytes + weight.nbytes + importance.nbytes,
        written=importance.nbytes,
        unit="bf16" if dtype == torch.bfloat16 else "fp32",
    )


def case(tokens: int, rows: int, features: int, dtype: torch.dtype, **where) -> Case:
    sizes = {"tokens": tokens, "rows": rows, "features": features, "dtype": dtype}
    name = f"sensitivity_ {short(dtype)} [{tokens}, {features}] x [{rows}, {features}]"
    toy = {"tokens": 64, "rows": 56, "features": 64}
    return Case(name, sensitivity, sizes, toy, op="sensitivity_", rounds=3, **where)


CASES = [
    case(4096, 2048, 2048, torch.float32, cpu={FORMULA: None}),
    case(4096, 2048, 2048, torch.bfloat16, cpu={FORMULA: None}),
    case(16384, 4096, 4096, torch.bfloat16, cuda={PRODUCTS: None}),
]


def test_sensitivity(timed, case):
    timed(case)
