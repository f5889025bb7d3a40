"""Elementwise activation functions of decoders' feed-forward networks, by name, with their slopes."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


def check_activation(name: object) -> None:
    """Raise `ValueError` unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return the activation of `x` as transformers computes it: `gelu` by the error function, `gelu_tanh` by its approximation."""
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_with_slope(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activation of `x` and its derivative."""
    value = activate(x, name)
    if name == "relu":
        return value, (x > 0).to(x.dtype)
    if name == "silu":
        gate = torch.sigmoid(x)
        return value, gate * (1 + x * (1 - gate))
    if name == "gelu_tanh":
        twice = 2 * math.sqrt(2 / math.pi)
        gate = torch.sigmoid(twice * (x + 0.044715 * x**3))
        return value, gate + x * gate * (1 - gate) * (twice * (1 + 3 * 0.044715 * x * x))
    return value, torch.special.ndtr(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
