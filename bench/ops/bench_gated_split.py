from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from baselines.plain import gradient_steps
from sparsekern.ops import gated_split
from sparsekern.ops.gated_split import reference

from ..problems import gated_objective

TOKENS, FEATURES = 1024, 4096


IMPLEMENTATIONS = {
    "sparsekern": lambda *given: gated_split(*given, "silu"),
    "the same in PyTorch": lambda *given: reference(*given, "silu"),
    "two gradient steps": gradient_steps,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gated_split(measure, generator, name):
    up, gate, *noise = torch.randn(5, TOKENS, FEATURES, generator=generator)
    given = F.silu(gate) * up + 0.3 * noise[0], up + 0.3 * noise[1], gate + 0.3 * noise[2], gate
    z, s = IMPLEMENTATIONS[name](*given)
    assert gated_objective(*given[:3], z, s).sum() < gated_objective(*given[:3], up, gate).sum()
    entries = TOKENS * FEATURES
    measure(lambda: IMPLEMENTATIONS[name](*given), group=f"gated_split [{TOKENS}, {FEATURES}]", bytes=24 * entries, rounds=3)
