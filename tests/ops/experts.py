"""Problems and oracle of the products with packed experts."""

from __future__ import annotations

import torch

from .strategies import INTERPRETED

# Experts, rows, columns, tokens, choices. On a CPU up to 32 tokens of an expert, and on a CUDA device up to 16 tokens, share its values.
EXACT_CASES = [(1, 1, 1, 1, 1), (4, 33, 130, 1, 3), (3, 17, 64, 5, 2), (2, 30, 72, 40, 2)]
if not INTERPRETED:
    EXACT_CASES += [(8, 16, 96, 17, 8)]


def sparse_experts(
    count: int, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, zeros: float = 0.5
) -> torch.Tensor:
    """Return `[count, rows, columns]`; each expert has another share of zeros, and the last one a row of them."""
    weight = torch.randn(count, rows, columns, generator=generator)
    shares = zeros + torch.linspace(-0.1, 0.1, count)[:, None, None]
    weight = weight * (torch.rand(weight.shape, generator=generator) >= shares)
    weight[-1:, rows // 2 : rows // 2 + 1] = -0.0
    return weight.to(dtype)


def choice(count: int, tokens: int, choices: int, generator: torch.Generator) -> torch.Tensor:
    """Return random experts for each token, some of them named more often than others."""
    skewed = torch.rand(tokens, choices, generator=generator) ** 2 * count
    return skewed.long().clamp(max=count - 1)


def assert_close_to_exact(y, x, experts, weight, bias=None) -> None:
    """Within the rounding of the output, and of float32 sums, of the definition in float64."""
    assert y.dtype == x.dtype and y.shape == (*experts.shape, weight.shape[1])
    chosen, row = weight.double()[experts], x.double()[:, None, :, None]
    added = torch.zeros(()) if bias is None else bias.double()[experts]
    exact = (chosen @ row).squeeze(-1) + added
    size = (chosen.abs() @ row.abs()).squeeze(-1) + added.abs()
    bound = torch.finfo(y.dtype).eps * exact.abs() + 2e-6 * size + torch.finfo(y.dtype).tiny
    assert ((y.double() - exact).abs() <= bound).all()
