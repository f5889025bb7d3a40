"""What the solvers are measured on, conditioned like a real layer, and plain forms of them that they are measured against."""

from __future__ import annotations

import torch
from torch.nn import functional as F

DAMPING = 0.01


def gram_of(generator: torch.Generator, features: int) -> torch.Tensor:
    """`X^T X` of twice as many tokens as features."""
    x = correlated_tokens(generator, 2 * features, features)
    return x.T @ x


def correlated_tokens(generator: torch.Generator, tokens: int, features: int) -> torch.Tensor:
    """Features of different size and correlated with one another."""
    mixed = torch.eye(features) + torch.randn(features, features, generator=generator) * (0.5 / features**0.5)
    x = torch.randn(tokens, features, generator=generator) @ mixed
    return x.mul_(torch.rand(features, generator=generator) ** 2 * 3 + 0.1)


def damped(gram: torch.Tensor) -> torch.Tensor:
    """`gram` with the damping that all sides use on its diagonal."""
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (DAMPING * gram.diagonal().mean())


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def output_error(weight: torch.Tensor, new_weight: torch.Tensor, gram: torch.Tensor) -> float:
    """`tr((W' - W) G (W' - W)^T)`, the squared output error on the calibration tokens."""
    delta = (new_weight - weight).double()
    return float(((delta @ gram.double()) * delta).sum())


def gated_objective(p, up, gate, z, s) -> torch.Tensor:
    return (p - F.silu(s) * z).square() + (z - up).square() + (s - gate).square()
