from __future__ import annotations

import pytest
import torch

from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.ops import q4_scales


def cost(own: torch.Tensor, costs: torch.Tensor, scale: float) -> float:
    return float(((own - scale * (own / (scale or 1)).round().clamp(-8, 7)).square() * costs).sum())


def test_no_scale_that_is_tried_is_better(isa, generator):
    weight, importance = torch.randn(5, 100, generator=generator), torch.rand(100, generator=generator)
    weight[1, :COLUMNS], weight[2] = 0, weight[2].abs()
    found = q4_scales(weight, importance).double()
    assert found.shape == (5, 2) and found[1, 0] == 0 and not torch.signbit(found[1, 0])
    for row in range(5):
        for block in range(2):
            own, costs = (value[..., block * 64 : block * 64 + 64].double() for value in (weight[row], importance))
            extreme = float(own[own.abs().argmax()])
            tried = [float(torch.tensor(-extreme / 8 * (1 - step / 46)).half()) for step in range(24)]
            assert float(found[row, block]) in tried or extreme == 0
            assert cost(own, costs, float(found[row, block])) <= min(cost(own, costs, scale) for scale in tried) * (1 + 1e-5)


def test_the_extreme_is_the_lowest_code_and_columns_without_importance_do_not_matter(isa):
    weight = torch.zeros(2, 70)
    weight[0, 3], weight[1, 66] = 4.0, -4.0
    found = q4_scales(weight, torch.ones(70))
    assert found.tolist() == [[-0.5, 0.0], [0.0, 0.5]]
    halves = torch.arange(5, 11)
    weight[0, halves] = -0.25
    assert q4_scales(weight, torch.ones(70))[0, 0] != -0.5
    assert q4_scales(weight, torch.ones(70).index_fill(0, halves, 0))[0, 0] == -0.5


def test_shapes_without_values(isa):
    assert q4_scales(torch.zeros(0, 64), torch.zeros(64)).shape == (0, 1)
    assert q4_scales(torch.zeros(3, 0), torch.zeros(0)).shape == (3, 0)


def test_costs_beyond_float32_leave_the_largest_scale(isa):
    weight, importance = torch.full((1, 64), 16.0), torch.full((64,), 3e38)
    weight[0, 0] = 15.0
    assert q4_scales(weight, importance)[0, 0] == -2.0


def test_arguments_are_refused(isa):
    weight = torch.ones(2, 70)
    for changed, message in (
        ({"weight": weight.half()}, "weight: expected dtype float32, got float16"),
        ({"importance": torch.ones(64)}, r"importance: expected shape \(70,\), got \(64,\)"),
        ({"weight": weight * torch.nan}, "weight: expected finite values"),
        ({"importance": torch.full((70,), torch.inf)}, "importance: expected finite values"),
        ({"weight": weight * 6e5}, "weight: expected magnitudes up to 524,032, which 4 bits and a float16 scale hold"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            q4_scales(**({"weight": weight, "importance": torch.ones(70)} | changed))
    assert q4_scales(weight * 5.24e5, torch.ones(70)).isfinite().all()
