from __future__ import annotations

import torch

from baselines.plain import conjugate_gradients
from sparsekern.ops import masked_lstsq

from ..inputs import damped, gram_of, output_error
from ..problem import Case, Place, Problem

PLAIN, ROWS = "ten plain iterations", "a factorisation for each row"


def row_by_row(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Solve exactly, each row by a factorisation of its own."""
    right, solution = weight @ gram, torch.zeros_like(weight)
    for row, support in enumerate(mask):
        kept = support.nonzero().flatten()
        factor = torch.linalg.cholesky(gram[kept[:, None], kept])
        solution[row, kept] = torch.cholesky_solve(right[row, kept, None], factor)[:, 0]
    return solution


def solve(place: Place, rows: int, columns: int, density: float, against: str) -> Problem:
    weight, gram = place.randn(rows, columns), damped(gram_of(place, columns))
    mask = place.rand(rows, columns) < density
    baselines = {PLAIN: conjugate_gradients, ROWS: row_by_row}

    def check(found: tuple[torch.Tensor, ...]) -> None:
        ours, theirs = (output_error(weight, new, gram) for new in (found[0], baselines[against](weight, gram, mask)))
        assert ours < 1.001 * theirs, f"output error {ours:.4g}, {against} leave {theirs:.4g}"
        assert not found[0][~mask].any(), "a pruned weight is not zero"

    return Problem(
        calls=[lambda: masked_lstsq(weight, gram, mask, tolerance=1e-4)],
        check=check,
        baselines={name: [lambda method=method: method(weight, gram, mask)] for name, method in baselines.items()},
        captured=False,
    )


def case(rows: int, columns: int, density: float, against: str, **where) -> Case:
    """`against` is the baseline whose error ours may not exceed."""
    sizes = {"rows": rows, "columns": columns, "density": density, "against": against}
    name = f"masked_lstsq {rows}x{columns}, {density:.0%} kept"
    return Case(name, solve, sizes, {"rows": 64, "columns": 96}, op="masked_lstsq", rounds=3, **where)


CASES = [
    case(1536, 576, 0.5, ROWS, cpu={PLAIN: None, ROWS: None}),
    case(1536, 576, 0.1, ROWS, cpu={ROWS: None}),
    case(576, 1536, 0.5, PLAIN, cpu={PLAIN: None}),
    case(4096, 4096, 0.5, PLAIN, cuda={PLAIN: None}),
]


def test_masked_lstsq(timed, case):
    timed(case)
