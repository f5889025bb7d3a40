from __future__ import annotations

import torch
from torch.nn.functional import linear

from sparsekern.layouts.int8_rows import quantize_rows, restore_rows
from sparsekern.ops import int8_linear

from ..inputs import short
from ..problem import Case, Place, Problem
from .bench_bitmask_linear import DENSE, TOY

HEADS = ((32_000, 2048), (128_256, 2048))


def product(place: Place, rows: int, columns: int, tokens: int) -> Problem:
    """A product with the head of a model in bfloat16, which no cache holds."""
    dense = place.randn(rows, columns, dtype=torch.bfloat16)
    values, scales = quantize_rows(dense)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)

    def check(result: torch.Tensor) -> None:
        """Compare some rows with the float64 product of the rounded weight, within what bfloat16 rounds."""
        exact = x.double() @ restore_rows(values[:512], scales[:512]).double().T
        assert float((result[:, :512].double() - exact).norm() / exact.norm()) < 0.004

    return Problem(
        calls=[lambda: int8_linear(x, values, scales)],
        check=check,
        baselines={DENSE: [lambda: linear(x, dense)]},
        flops=2 * tokens * rows * columns,
        read=values.nbytes + scales.nbytes + x.nbytes,
        written=2 * tokens * rows,
        unit="bf16",
    )


def case(tokens: int, shape: tuple[int, int], goal: float | None) -> Case:
    return Case(
        f"int8_linear, {tokens} token{'s' * (tokens > 1)}, {shape[0]}x{shape[1]} {short(torch.bfloat16)}",
        product,
        {"rows": shape[0], "columns": shape[1], "tokens": tokens},
        TOY | {"tokens": tokens},
        op="int8_linear",
        cpu={DENSE: goal},
        cuda={DENSE: None} if tokens == 1 else None,
        rounds=21 if tokens == 1 else 5,
    )


CASES = [*(case(1, shape, 1.7) for shape in HEADS), *(case(tokens, HEADS[0], None) for tokens in (4, 16, 64))]


def test_int8_linear(timed, case):
    timed(case)
