from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsekern.ops import gated_split
from sparsekern.ops.gated_split import reference

TOKENS, FEATURES = 1024, 4096


def gradient_steps(p, up, gate, s) -> tuple[torch.Tensor, torch.Tensor]:
    """The public program's updates for alpha = gamma = 5: z in closed form, then two steps of s through autograd."""
    z = (up + F.silu(s) * p) / (F.silu(s).square() + 1)
    for _ in range(2):
        s = s.detach().requires_grad_()
        (5 * (s - gate).square().sum() + 5 * (p - F.silu(s) * z).square().sum()).backward()
        s = s - 0.01 * s.grad
    return z, s.detach()


IMPLEMENTATIONS = {
    "sparsekern": lambda *given: gated_split(*given, "silu"),
    "the same in PyTorch": lambda *given: reference(*given, "silu"),
    "two gradient steps": gradient_steps,
}


def objective(p, up, gate, z, s) -> torch.Tensor:
    return (p - F.silu(s) * z).square() + (z - up).square() + (s - gate).square()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gated_split(measure, generator, name):
    up, gate, *noise = torch.randn(5, TOKENS, FEATURES, generator=generator)
    given = F.silu(gate) * up + 0.3 * noise[0], up + 0.3 * noise[1], gate + 0.3 * noise[2], gate
    z, s = IMPLEMENTATIONS[name](*given)
    assert objective(*given[:3], z, s).sum() < objective(*given[:3], up, gate).sum()
    entries = TOKENS * FEATURES
    measure(lambda: IMPLEMENTATIONS[name](*given), group=f"gated_split [{TOKENS}, {FEATURES}]", bytes=24 * entries, rounds=3)
