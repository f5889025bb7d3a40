from __future__ import annotations

import pytest
import torch

from baselines.textbook import textbook_sparsegpt
from sparsekern.ops import obs_sweep, reverse_cholesky

from ..problems import DAMPING, gram_of, output_error

TEXTBOOK = {"2:4": {"n_zeros": 2, "m": 4}, 0.5: {"sparsity": 0.5}}
GOALS = {
    (4096, 4096, 0.5): 5.0,
    (4096, 4096, "2:4"): 3.5,
    **{(rows, columns, pattern): 6.0 for rows, columns in ((576, 576), (1536, 576), (576, 1536)) for pattern in TEXTBOOK},
}


def prune(weight: torch.Tensor, gram: torch.Tensor, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    return obs_sweep(weight, reverse_cholesky(gram, DAMPING), pattern)[:2]


def textbook(weight: torch.Tensor, gram: torch.Tensor, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    return textbook_sparsegpt(weight, gram, percdamp=DAMPING, **TEXTBOOK[pattern])


def assert_equal_at_small_size(generator: torch.Generator, pattern) -> None:
    """Against the textbook in float64. For a sparsity it prunes one weight more in each block of 128 columns, which moves a few others."""
    weight, gram = torch.randn(96, 256, generator=generator), gram_of(generator, 256)
    new_weight, mask = prune(weight, gram, pattern)
    expected, expected_mask = textbook(weight.double(), gram.double(), pattern)
    same = mask == expected_mask
    assert int((~same).sum()) <= (0 if pattern == "2:4" else 16)
    rows = same.all(1)
    assert torch.allclose(new_weight[rows].double(), expected[rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "pattern"), GOALS)
def test_prune_a_layer(measure, generator, rows, columns, pattern):
    """`reverse_cholesky` and `obs_sweep` against three factorisations and a loop over columns."""
    assert_equal_at_small_size(generator, pattern)
    weight, gram = torch.randn(rows, columns, generator=generator), gram_of(generator, columns)
    (ours, mask), (theirs, their_mask) = prune(weight, gram, pattern), textbook(weight, gram, pattern)
    assert float((mask == their_mask).float().mean()) > 0.999
    assert output_error(weight, ours, gram) < 1.001 * output_error(weight, theirs, gram)
    measure(
        lambda: prune(weight, gram, pattern),
        against=lambda: textbook(weight, gram, pattern),
        baseline="textbook",
        goal=GOALS[rows, columns, pattern],
        group=f"reverse_cholesky + obs_sweep {rows}x{columns} {pattern}",
        flops=columns**3 // 3 + rows * columns**2,
        bytes=2 * weight.nbytes + mask.nbytes + gram.nbytes,
        rounds=3 if columns > 2000 else 7,
        warmup=columns <= 2000,
    )


@pytest.mark.parametrize("pattern", TEXTBOOK)
@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (1536, 576), (576, 1536), (4096, 4096)])
def test_sweep_alone(measure, generator, rows, columns, pattern):
    assert_equal_at_small_size(generator, pattern)
    weight, gram = torch.randn(rows, columns, generator=generator), gram_of(generator, columns)
    factor = reverse_cholesky(gram, DAMPING)
    measure(
        lambda: obs_sweep(weight, factor, pattern),
        group=f"obs_sweep {rows}x{columns}",
        flops=rows * columns**2,
        rounds=3 if columns > 2000 else 7,
    )
