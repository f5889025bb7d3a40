from __future__ import annotations

import pytest
import torch

from baselines.plain import conjugate_gradients
from sparsekern.ops import masked_lstsq

from ..problems import damped, gram_of, output_error


def row_by_row(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Exactly, each row by a factorisation of its own."""
    right, solution = weight @ gram, torch.zeros_like(weight)
    for row, support in enumerate(mask):
        kept = support.nonzero().flatten()
        factor = torch.linalg.cholesky(gram[kept[:, None], kept])
        solution[row, kept] = torch.cholesky_solve(right[row, kept, None], factor)[:, 0]
    return solution


@pytest.mark.parametrize(
    ("rows", "columns", "density", "baseline", "tolerance"),
    [
        (1536, 576, 0.5, conjugate_gradients, 1e-4),
        (576, 1536, 0.5, conjugate_gradients, 1e-4),
        (1536, 576, 0.5, row_by_row, 1e-4),
        (1536, 576, 0.1, row_by_row, 1e-4),
    ],
)
def test_solve(measure, generator, rows, columns, density, baseline, tolerance):
    weight, gram = torch.randn(rows, columns, generator=generator), damped(gram_of(generator, columns))
    mask = torch.rand(rows, columns, generator=generator) < density
    ours, theirs = masked_lstsq(weight, gram, mask, tolerance=tolerance)[0], baseline(weight, gram, mask)
    assert output_error(weight, ours, gram) < 1.001 * output_error(weight, theirs, gram)
    measure(
        lambda: masked_lstsq(weight, gram, mask, tolerance=tolerance),
        against=lambda: baseline(weight, gram, mask),
        baseline=baseline.__name__.replace("_", " "),
        group=f"masked_lstsq {rows}x{columns}, {density:.0%} kept, against {baseline.__name__.replace('_', ' ')}",
        rounds=3,
    )
