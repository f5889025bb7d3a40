"""The benchmarks of 2:4 linears at run time: against the dense product and the best plan that cuSPARSELt finds for the shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from sparsekern import ops
from sparsekern.runtime import semi_structured_linear, to_semi_structured

from .cases import Faster, Place, Problem, case
from .device import Call, seconds_of
from .select_cases import sparse

DENSE, BEST_PLAN = "dense cuBLAS", "best cuSPARSELt plan"


def sparse_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`x -> x @ weight.T` from the packed weight; on a CPU, where it is only tried out, by unpacking."""
    values, meta = ops.semi_structured_pack(weight)
    if weight.device.type != "cuda":
        return lambda x: functional.linear(x, ops.semi_structured_unpack(values, meta))
    tensor = to_semi_structured((values, meta))
    return lambda x: semi_structured_linear(x, tensor)


def best_plan(weight: torch.Tensor, x: torch.Tensor, place: Place) -> Call:
    """The fastest of cuSPARSELt's own choices: with the result as it comes and transposed."""
    compressed = torch._cslt_compress(weight)
    plans: list[Call] = []
    for transposed in (False, True):
        algorithm, split, mode, _ = torch._C._cusparselt.mm_search(compressed, x.T, None, None, None, transposed)
        options = {"transpose_result": transposed, "alg_id": algorithm, "split_k": split, "split_k_mode": mode}
        plans.append(lambda options=options: torch._cslt_sparse_mm(compressed, x.T, **options))
    return min(plans, key=lambda plan: seconds_of([plan], place.device))


def linear(place: Place, tokens: int, rows: int, columns: int, goals=()) -> Problem:
    weight = sparse(place.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    multiply = sparse_linear(weight)

    def check(result: torch.Tensor) -> None:
        exact = x[:64].double() @ weight.double().T
        error = float((result[:64].double() - exact).norm() / exact.norm())
        assert error < 4e-3, f"error {error:.2e}"

    baselines = {DENSE: [lambda: functional.linear(x, weight)]}
    if place.device.type == "cuda" and torch.backends.cusparselt.is_available():
        baselines[BEST_PLAN] = [best_plan(weight, x, place)]
    return Problem(
        calls=[lambda: multiply(x)],
        check=check,
        baselines=baselines,
        flops=tokens * rows * columns,  # half of the dense product's
        bytes=x.nbytes + weight.nbytes * 9 // 16 + tokens * rows * 2,
        unit="bf16",
        goals=tuple(goal for goal in goals if goal.than in baselines),
    )


@case("2:4 linear, 4096 tokens, 11008x4096 bf16", likely_seconds=10)
def up_projection(place: Place) -> Problem:
    sizes = place.size(4096, 64), place.size(11008, 128), place.size(4096, 128)
    return linear(place, *sizes, goals=(Faster(1.4, DENSE), Faster(1.0, BEST_PLAN)))


@case("2:4 linear, 4096 tokens, 4096x11008 bf16", likely_seconds=10)
def down_projection(place: Place) -> Problem:
    return linear(place, place.size(4096, 64), place.size(4096, 128), place.size(11008, 128))


@case("2:4 linear, 1 token, 11008x4096 bf16", likely_seconds=6)
def decode(place: Place) -> Problem:
    """Where 2:4 pays least: said as it is."""
    return linear(place, 1, place.size(11008, 128), place.size(4096, 128))
