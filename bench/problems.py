"""What the solvers are measured on, conditioned like a real layer, and plain forms of them that they are measured against."""

from __future__ import annotations

import torch
from torch.nn import functional as F

DAMPING = 0.01
CG_ITERATIONS = 10


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


def plain_admm_step_(
    offset: torch.Tensor,
    dual: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    pattern: str | float,
    *,
    scope: str = "matrix",
) -> torch.Tensor:
    """`admm_step_` as torch has it: `kthvalue` for the threshold, a top-k for groups of four."""
    z = weight + offset + dual
    size = z.abs()
    if pattern == "2:4":
        groups = size.view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True).view_as(z)
    elif scope == "row":
        kept = size > torch.kthvalue(size, int(pattern * z.shape[1]), dim=1, keepdim=True).values
    else:
        kept = size > torch.kthvalue(size.flatten(), int(pattern * z.numel())).values
    projected = z * kept
    dual.copy_(z - projected)
    offset.copy_(projected - dual - weight)
    changed = (kept != mask).sum()
    mask.copy_(kept)
    return changed


def conjugate_gradients(
    weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The public program's solution, with one product an iteration in place of its three, from `start` or the weight itself."""
    scale = gram.diagonal().sqrt()
    gram, target = gram / scale / scale[:, None], weight * scale
    solution = (target if start is None else start * scale) * mask
    residual = ((target - solution) @ gram) * mask
    direction, power = residual, residual.square().sum(1)
    for _ in range(CG_ITERATIONS):
        product = direction @ gram
        alpha = (power / (direction * product).sum(1).clamp_min(1e-30))[:, None]
        solution = solution + alpha * direction
        residual = residual - alpha * product * mask
        power, last = residual.square().sum(1), power
        direction = residual + (power / last.clamp_min(1e-30))[:, None] * direction
    return solution / scale


def gradient_steps(p, up, gate, s) -> tuple[torch.Tensor, torch.Tensor]:
    """The public program's updates for alpha = gamma = 5: z in closed form, then two steps of s through autograd."""
    z = (up + F.silu(s) * p) / (F.silu(s).square() + 1)
    for _ in range(2):
        s = s.detach().requires_grad_()
        (5 * (s - gate).square().sum() + 5 * (p - F.silu(s) * z).square().sum()).backward()
        s = s - 0.01 * s.grad
    return z, s.detach()


def gated_objective(p, up, gate, z, s) -> torch.Tensor:
    return (p - F.silu(s) * z).square() + (z - up).square() + (s - gate).square()
