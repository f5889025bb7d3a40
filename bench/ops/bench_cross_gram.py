from __future__ import annotations

import pytest
import torch

from sparsekern.ops import cross_gram_

TOKENS, P, Q = 16384, 1024, 2048


def public(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    cross += x.float().T @ y.float()


IMPLEMENTATIONS = {"sparsekern": cross_gram_, "float().T @ float()": public}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_cross_gram(measure, generator, name, dtype):
    x, y = (torch.randn(TOKENS, features, generator=generator).to(dtype) for features in (P, Q))
    add, cross = IMPLEMENTATIONS[name], torch.zeros(P, Q)
    add(cross, x, y)
    exact = x[:, :8].double().T @ y.double()
    assert (cross[:8] - exact).norm() <= 1e-5 * exact.norm()
    measure(
        lambda: add(cross, x, y),
        group=f"cross_gram_ {str(dtype).removeprefix('torch.')} [{TOKENS}, {P}] x [{TOKENS}, {Q}]",
        flops=2 * TOKENS * P * Q,
        bytes=x.nbytes + y.nbytes + cross.nbytes,
        rounds=3,
    )
