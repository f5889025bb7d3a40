from __future__ import annotations

import pytest
import torch

from sparsekern.ops import sensitivity_

TOKENS, ROWS, FEATURES = 4096, 2048, 2048


def at_once(importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> None:
    """The formula as it reads, with all outputs and the whole product in memory."""
    weight, x = weight.float(), x.float()
    importance += weight.abs() * ((x @ weight.T).abs().T @ x.abs())


IMPLEMENTATIONS = {"sparsekern": sensitivity_, "the formula at once": at_once}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sensitivity(measure, generator, name, dtype):
    weight = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
    x = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype)
    add, importance = IMPLEMENTATIONS[name], torch.zeros(ROWS, FEATURES)
    add(importance, weight, x)
    rows = weight[:8].double()
    exact = rows.abs() * ((x.double() @ rows.T).abs().T @ x.double().abs())
    assert (importance[:8] - exact).norm() <= 1e-5 * exact.norm()
    measure(
        lambda: add(importance, weight, x),
        group=f"sensitivity_ {str(dtype).removeprefix('torch.')} [{TOKENS}, {FEATURES}] x [{ROWS}, {FEATURES}]",
        flops=4 * TOKENS * ROWS * FEATURES,
        bytes=x.nbytes + weight.nbytes + 2 * importance.nbytes,
        rounds=3,
    )
