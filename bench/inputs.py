"""Inputs of benchmarks, conditioned like those of real layers, and the checks that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsekern.ops import nm_mask

from .problem import Place

DAMPING = 0.01
CHECKED = 48  # rows or columns of a large product that are computed in float64 too
TOKENS_AT_ONCE = 2**14  # in float64


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def activations(place: Place, tokens: int, features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return `[tokens, features]` with a few features much larger than the rest, as language models have them."""
    scale = place.rand(features) ** 4 * 10 + 0.1
    x = torch.empty(tokens, features, dtype=dtype, device=place.device)
    for part in x.split(TOKENS_AT_ONCE):
        part.copy_(place.randn(*part.shape) * scale)
    return x


def correlated_tokens(generator: torch.Generator, tokens: int, features: int) -> torch.Tensor:
    """Return `[tokens, features]` with features of different size, correlated with one another."""
    device = generator.device
    mixing = torch.randn(features, features, generator=generator, device=device) * (0.5 / features**0.5)
    x = torch.randn(tokens, features, generator=generator, device=device) @ (torch.eye(features, device=device) + mixing)
    return x.mul_(torch.rand(features, generator=generator, device=device) ** 2 * 3 + 0.1)


def gram_of(place: Place, features: int) -> torch.Tensor:
    """Return `X^T X` of twice as many correlated tokens as features."""
    x = correlated_tokens(place.generator, 2 * features, features)
    return x.T @ x


def damped(gram: torch.Tensor) -> torch.Tensor:
    """Return `gram` with `DAMPING` on its diagonal, in its dtype."""
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (DAMPING * gram.diagonal().mean())


def half_zero(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` with its negative half set to zero."""
    return weight.clamp(min=0)


def n_of_m(weight: torch.Tensor, pattern: str = "2:4") -> torch.Tensor:
    """Return `weight` pruned by magnitude to an N:M pattern."""
    return weight.masked_fill(~nm_mask(weight.abs(), pattern), 0)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over that of `exact`."""
    return float((actual - exact).norm() / exact.norm())


def output_error(weight: torch.Tensor, new_weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Return `tr((W' - W) G (W' - W)^T)`, the squared output error on the calibration tokens."""
    delta = (new_weight.float() - weight.float()).double()
    return float(((delta @ gram.double()) * delta).sum())


def exact_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `x.T @ y` in float64, a few tokens at a time."""
    exact = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for left, right in zip(x.split(TOKENS_AT_ONCE), y.split(TOKENS_AT_ONCE), strict=True):
        exact += left.double().T @ right.double()
    return exact


def assert_close(actual: torch.Tensor, exact: torch.Tensor, relative: float) -> None:
    """Raise AssertionError if the relative error is above `relative`."""
    error = relative_error(actual, exact)
    assert error <= relative, f"error {error:.2e}, expected at most {relative:.0e}"


def same(expected: Callable[[], object]) -> Callable[[object], None]:
    """Return a check that a result, or each tensor of one, equals to the bit what `expected` returns."""

    def check(result) -> None:
        wanted = expected()
        pairs = zip(result, wanted, strict=True) if isinstance(result, tuple) else [(result, wanted)]
        for got, want in pairs:
            assert got.dtype == want.dtype and torch.equal(got, want), "not the expected bits"

    return check
