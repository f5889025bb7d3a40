"""SparseLLM's LLaMA form as its public program computes it, on one feed-forward network.

Nothing is left out: pseudo-inverses by SVD, an explicit inverse as wide as the hidden layer, two epochs of gradient steps through
autograd, a loss for the log, and three chains of three factorisations a round. It runs in float32, because CPUs lack fast half precision.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .textbook import textbook_sparsegpt

ROUNDS = 4
WEIGHT, EPOCHS, RATE, CHUNK = 5.0, 2, 0.01, 1000  # alpha = beta = gamma, and the steps of s


def public_sparsellm(
    x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, down: torch.Tensor, sparsity: float
) -> list[torch.Tensor]:
    """Return up, gate and down after `ROUNDS` rounds; `x` is `[tokens, inputs]`."""
    x = x.T.contiguous()  # from here on, a column is a token
    z, s = up @ x, gate @ x
    p = F.silu(s) * z
    y = down @ p
    x_inverse = torch.linalg.pinv(x)
    hessian_x, hessian_p = x @ x.T, p @ p.T
    for turn in range(ROUNDS):
        if turn:
            up, down, gate = z @ x_inverse, y @ torch.linalg.pinv(p), s @ x_inverse
            hessian_p = p @ p.T
        up, gate = (textbook_sparsegpt(weight, hessian_x, sparsity)[0] for weight in (up, gate))
        down = textbook_sparsegpt(down, hessian_p, sparsity)[0]
        inverse = torch.inverse(WEIGHT * down.T @ down + WEIGHT * torch.eye(len(p)))
        p = inverse @ (WEIGHT * down.T @ y + WEIGHT * F.silu(s) * z)
        z = (up @ x + F.silu(s) * p) / (F.silu(s) ** 2 + 1)
        s = _step_s(x, gate, z, p, s)
        F.mse_loss(down @ (F.silu(gate @ x) * (up @ x)), y)
    return [up, gate, down]


def _step_s(x: torch.Tensor, gate: torch.Tensor, z: torch.Tensor, p: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    s = s.clone()
    for _ in range(EPOCHS):
        for start in range(0, s.shape[1], CHUNK):
            tokens = slice(start, start + CHUNK)
            with torch.enable_grad():
                given = [
                    v.detach().clone().requires_grad_() for v in (s[:, tokens], gate, x[:, tokens], z[:, tokens], p[:, tokens])
                ]
                chunk, w, inputs, wanted, activated = given
                loss = WEIGHT * (chunk - w @ inputs).square().sum() + WEIGHT * (activated - F.silu(chunk) * wanted).square().sum()
                loss.backward()
            s[:, tokens] -= RATE * chunk.grad
    return s
