"""Steps of the methods in plain PyTorch: the same algorithms as ours without custom kernels."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def plain_admm_step_(
    offset: torch.Tensor,
    dual: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    pattern: str | float,
    *,
    scope: str = "matrix",
) -> torch.Tensor:
    """Take `admm_step_` in plain PyTorch: `kthvalue` for the threshold, a top-k for groups of four.

    Returns:
        The number of mask entries that changed.
    """
    z = weight + offset + dual
    kept = _largest(z.abs(), pattern, scope)
    projected = z * kept
    dual.copy_(z - projected)
    offset.copy_(projected - dual - weight)
    changed = (kept != mask).sum()
    mask.copy_(kept)
    return changed


def _largest(size: torch.Tensor, pattern: str | float, scope: str) -> torch.Tensor:
    """Return the mask of the largest entries; `kthvalue` drops every entry that equals the threshold."""
    if pattern == "2:4":
        groups = size.view(-1, 4)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True).view_as(size)
    if scope == "row":
        return size > torch.kthvalue(size, int(pattern * size.shape[1]), dim=1, keepdim=True).values
    return size > torch.kthvalue(size.flatten(), int(pattern * size.numel())).values


def plain_masked_adamw(
    optimizer: torch.optim.AdamW, weight: torch.Tensor, mask: torch.Tensor, half: torch.Tensor | None = None
) -> torch.Tensor:
    """Take a step of torch's fused AdamW on a fixed mask: the gradient is masked in front of it, and the weight behind it."""
    weight.grad.mul_(mask)
    optimizer.step()
    with torch.no_grad():
        weight.mul_(mask)
        if half is not None:
            half.copy_(weight)
    return weight


def plain_linear_kl(
    x: torch.Tensor, head: torch.Tensor, teacher_x: torch.Tensor, teacher_head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of each token and its gradient for `x` by autograd through stored logits."""
    hidden = x.detach().requires_grad_()
    teacher = F.log_softmax(teacher_x @ teacher_head.T, 1)
    divergence = F.kl_div(F.log_softmax(hidden @ head.T, 1), teacher, reduction="none", log_target=True).sum(1)
    (grad,) = torch.autograd.grad(divergence.sum(), hidden)
    return divergence.detach(), grad


def plain_alps(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float, damping: float = 0.01) -> torch.Tensor:
    """Prune by ALPS in plain PyTorch, without what the public program wastes.

    A Cholesky inverse serves each penalty, `kthvalue` or a top-k of groups the projection, and one product an iteration of conjugate
    gradients.

    Args:
        weight: `[rows, columns]`.
        gram: `[columns, columns]`, `X^T X`.
        pattern: "2:4", or the share of zeros.
        damping: Added to the diagonal, as a share of its mean.

    Returns:
        The pruned weight.
    """
    identity = torch.eye(len(gram))
    gram = gram + damping * gram.diagonal().mean() * identity
    scale = gram.diagonal().sqrt()
    gram, target = gram / scale / scale[:, None], weight * scale

    def inverse(rho: float) -> torch.Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(gram + rho * identity))

    rho, mask, dual = 0.1, _largest(target.abs(), pattern, "matrix"), torch.zeros_like(target)
    kept, seen, sparse, step = int(mask.sum()), mask, target * mask, inverse(0.1)
    for iteration in range(300):
        dense = target - rho * ((target - sparse + dual) @ step)
        z = dense + dual
        mask = _largest(z.abs(), pattern, "matrix")
        sparse = z * mask
        dual = z - sparse
        if iteration % 3 == 2:
            changed, seen = int((mask != seen).sum()) / kept, mask
            if changed == 0 or (iteration >= 30 and changed < 3e-4):
                break
            growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            dual, rho = dual / growth, rho * growth
            step = inverse(rho)
    mask = _largest(dense.abs(), pattern, "matrix")
    return conjugate_gradients(target, gram, mask, start=dense) / scale


def conjugate_gradients(
    weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, start: torch.Tensor | None = None, iterations: int = 10
) -> torch.Tensor:
    """Solve for the weights that `mask` keeps by the public program's conjugate gradients, with one product an iteration.

    The public program computes three products an iteration. `start` is the first guess; None is the weight itself.
    """
    scale = gram.diagonal().sqrt()
    gram, target = gram / scale / scale[:, None], weight * scale
    solution = (target if start is None else start * scale) * mask
    residual = ((target - solution) @ gram) * mask
    direction, power = residual, residual.square().sum(1)
    for _ in range(iterations):
        product = direction @ gram
        alpha = (power / (direction * product).sum(1).clamp_min(1e-30))[:, None]
        solution = solution + alpha * direction
        residual = residual - alpha * product * mask
        power, last = residual.square().sum(1), power
        direction = residual + (power / last.clamp_min(1e-30))[:, None] * direction
    return solution / scale


def gradient_steps(p: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and s after the public SparseLLM's updates for alpha = gamma = 5: z in closed form, then two gradient steps of s."""
    z = (up + F.silu(s) * p) / (F.silu(s).square() + 1)
    for _ in range(2):
        s = s.detach().requires_grad_()
        (5 * (s - gate).square().sum() + 5 * (p - F.silu(s) * z).square().sum()).backward()
        s = s - 0.01 * s.grad
    return z, s.detach()
