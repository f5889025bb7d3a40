"""plain_split against its objective: ReLU against a grid and the two parabolas, the smooth activations against a search."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekern.ops import plain_split

from .strategies import FLOATS, assert_rounded_once
from .test_gated_split import EVERY_ACTIVATION, FUNCTIONS


def objective(p, m, z, activation: str, ratio: float) -> torch.Tensor:
    p, m, z = p.double(), m.double(), z.double()
    return ratio * (p - FUNCTIONS[activation](z)).square() + (z - m).square()


@EVERY_ACTIVATION
@pytest.mark.parametrize("ratio", [0.5, 10.0])
def test_is_the_minimum_over_a_fine_grid(isa, generator, activation, ratio):
    p, m = torch.randn(2, 3, 100, generator=generator) * 2
    z = plain_split(p, m, m, activation, ratio, steps=12)
    reached = objective(p, m, z, activation, ratio)
    line = torch.linspace(-10, 10, 8001, dtype=torch.float64).view(-1, 1, 1)
    everywhere = objective(p, m, line, activation, ratio).amin(0)
    if activation == "relu":
        assert (reached <= everywhere + 1e-5).all()
    else:
        assert (reached <= everywhere + 1e-2 * everywhere.mean()).double().mean() > 0.97


@EVERY_ACTIVATION
def test_never_worse_than_the_start(isa, generator, activation):
    p, m, start = torch.randn(3, 4, 70, generator=generator) * 3
    z = plain_split(p, m, start, activation, 2.0, steps=2)
    before = objective(p, m, start, activation, 2.0)
    assert (objective(p, m, z, activation, 2.0) <= before * (1 + 1e-5) + 1e-5).all()


def test_relu_by_hand(isa):
    p = torch.tensor([[2.0, 0.0, -1.0, 2.0, 0.0, 0.0]])
    m = torch.tensor([[1.0, -3.0, -2.0, -0.1, 0.0, 2.0]])
    assert plain_split(p, m, m, "relu", 1.0)[0].tolist() == pytest.approx([1.5, -3, -2, 0.95, 0, 1])


def test_of_equal_minima_the_active_one_is_taken(isa):
    # p = 1: the active side gives z = (1 + m) / 2 and (1 - m)^2 / 2, the silent side z = m and 1: equal at m = 1 - sqrt(2).
    p, m = torch.ones(1, 2), torch.tensor([[1 - math.sqrt(2) - 1e-3, 1 - math.sqrt(2) + 1e-3]])
    z = plain_split(p, m, m, "relu", 1.0)[0]
    assert z[0] == m[0, 0] and z[1] == pytest.approx((1 + m[0, 1].item()) / 2)
    assert plain_split(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), "relu").item() == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_half_dtypes_are_rounded_once(isa, generator, activation, dtype):
    given = [v.to(dtype) for v in torch.randn(3, 5, 77, generator=generator)]
    z = plain_split(*given, activation)
    assert z.dtype == dtype
    assert_rounded_once(z, plain_split(*(v.float() for v in given), activation))


@EVERY_ACTIVATION
def test_nan_and_empty(isa, activation):
    p, m = torch.tensor([[math.nan, 1.0, 1.0]]), torch.tensor([[1.0, math.nan, 1.0]])
    z = plain_split(p, m, torch.zeros(1, 3), activation)
    assert z[0, :2].isnan().all() and z[0, 2].isfinite()
    assert plain_split(*[torch.zeros(3, 0)] * 3, activation).shape == (3, 0)


def test_arguments_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"preactivation: expected shape \(2, 3\), got \(1, 3\)"):
        plain_split(x, x[:1], x)
    with pytest.raises(TypeError, match="start: expected dtype float32, got float16"):
        plain_split(x, x, x.half())
    with pytest.raises(ValueError, match="activation: expected one of relu, silu, gelu, gelu_tanh, got None"):
        plain_split(x, x, x, None)
    with pytest.raises(ValueError, match="ratio: expected a number above 0, got -1"):
        plain_split(x, x, x, ratio=-1)
    with pytest.raises(TypeError, match="steps: expected a whole number, got 1.5"):
        plain_split(x, x, x, steps=1.5)
