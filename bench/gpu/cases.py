"""Benchmarks that only a GPU has: 2:4 linears by sparse tensor cores, and float32 products by tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from sparsekern import ops
from sparsekern.backends import products
from sparsekern.runtime import semi_structured_linear, to_semi_structured

from ..inputs import CHECKED, assert_close, n_of_m
from ..problem import Call, Case, NotHere, Place, Problem
from .device import seconds_of

PIECES, TRITON = "from bfloat16 pieces", "in Triton"
DENSE, BEST_PLAN, ADDMM = "dense cuBLAS", "best cuSPARSELt plan", "addmm in float32"
TOKEN_MULTIPLE = 8  # of cuSPARSELt's dense operands of two bytes


def semi_structured(weight: torch.Tensor, backend: str = "cutlass") -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `x -> x @ weight.T` from the packed weight; a CPU, where it is only tried out, unpacks it."""
    packed = ops.semi_structured_pack(weight)
    if weight.device.type != "cuda":
        return lambda x: functional.linear(x, ops.semi_structured_unpack(*packed))
    tensor = to_semi_structured(packed) if backend == "cutlass" else to_semi_structured(weight, backend=backend)
    return lambda x: semi_structured_linear(x, tensor)


def best_plan(weight: torch.Tensor, x: torch.Tensor) -> Call:
    """Return the fastest of cuSPARSELt's own choices: with the result as it comes and transposed."""
    compressed = torch._cslt_compress(weight)
    plans: list[Call] = []
    for transposed in (False, True):
        algorithm, split, mode, _ = torch._C._cusparselt.mm_search(compressed, x.T, None, None, None, transposed)
        options = {"transpose_result": transposed, "alg_id": algorithm, "split_k": split, "split_k_mode": mode}
        plans.append(lambda options=options: torch._cslt_sparse_mm(compressed, x.T, **options))
    return min(plans, key=lambda plan: seconds_of([plan], x.device))


def linear(place: Place, tokens: int, rows: int, columns: int) -> Problem:
    weight = n_of_m(place.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    multiply = semi_structured(weight)
    baselines = {DENSE: [lambda: functional.linear(x, weight)]}
    if place.device.type == "cuda" and torch.backends.cusparselt.is_available() and tokens % TOKEN_MULTIPLE == 0:
        baselines[BEST_PLAN] = [best_plan(weight, x)]
    return Problem(
        calls=[lambda: multiply(x)],
        check=lambda result: assert_close(result[:CHECKED].double(), x[:CHECKED].double() @ weight.double().T, 4e-3),
        baselines=baselines,
        flops=tokens * rows * columns,  # half of the dense product's
        read=x.nbytes + weight.nbytes * 9 // 16,
        written=tokens * rows * x.element_size(),
        unit="bf16",
    )


def float32_product(place: Place, size: int, by: str) -> Problem:
    """Make the problem of a large product of a sweep: from pieces by cuBLAS, as it is computed, or by one kernel in Triton."""
    if place.device.type != "cuda":
        raise NotHere("Triton's kernels need a GPU")
    from sparsekern.triton_kernels import matmul

    def in_pieces(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        products.add_product(out, left, right, begins=False)

    add_product = {PIECES: in_pieces, TRITON: matmul.add_product}[by]
    a, b = place.randn(size, size), place.randn(size, size)
    ours, theirs = torch.zeros_like(a), torch.zeros_like(a)

    def error(result: torch.Tensor) -> float:
        exact = a[:CHECKED].double() @ b.double()
        return float((result[:CHECKED].double() - exact).norm() / exact.norm())

    def check(_) -> None:
        fresh = torch.zeros_like(a)
        add_product(fresh, a, b)
        assert error(fresh) <= 2 * error(a @ b), f"error {error(fresh):.2e}, cuBLAS's is {error(a @ b):.2e}"

    return Problem(
        calls=[lambda: add_product(ours, a, b)],
        check=check,
        baselines={ADDMM: [lambda: torch.addmm(theirs, a, b, out=theirs)]},
        flops=2 * size**3,
        read=3 * a.nbytes,
        written=a.nbytes,
    )


def case(tokens: int, rows: int, columns: int, likely_seconds: float, goals: dict[str, float | None]) -> Case:
    return Case(
        f"2:4 linear, {tokens} token{'s' * (tokens > 1)}, {rows}x{columns} bf16",
        linear,
        {"tokens": tokens, "rows": rows, "columns": columns},
        {"tokens": min(tokens, 64), "rows": 128, "columns": 128},
        cuda=goals,
        likely_seconds=likely_seconds,
    )


CASES = [
    case(4096, 11008, 4096, 10, {DENSE: 1.4, BEST_PLAN: 1.0}),
    case(4096, 4096, 11008, 10, {DENSE: None, BEST_PLAN: None}),
    case(1, 11008, 4096, 6, {DENSE: None}),  # where 2:4 pays least
    *(
        Case(f"float32 product 4096x4096x4096 {by}", float32_product, {"size": 4096, "by": by}, {}, cuda={ADDMM: None})
        for by in (PIECES, TRITON)
    ),
]
