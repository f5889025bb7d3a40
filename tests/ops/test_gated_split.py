"""gated_split against its objective: the best z in closed form, s against a search of the whole line, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sparsekern.ops import gated_split

from .strategies import FLOATS, assert_rounded_once

FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
EVERY_ACTIVATION = pytest.mark.parametrize("activation", FUNCTIONS)


def entries(generator, activation: str, count: int = 400, size: float = 1.0):
    """What a pruned network leaves: p is what it was before, up and gate have moved."""
    up, gate, *noise = torch.randn(5, 4, count // 4, generator=generator) * size
    p = FUNCTIONS[activation](gate) * up + 0.3 * noise[0]
    return p, up + 0.3 * noise[1], gate + 0.3 * noise[2], gate


def objective(p, up, gate, z, s, activation: str, ratio: float) -> torch.Tensor:
    p, up, gate, z, s = (v.double() for v in (p, up, gate, z, s))
    return ratio * (p - FUNCTIONS[activation](s) * z).square() + (z - up).square() + (s - gate).square()


def best_z(p, up, s, activation: str, ratio: float) -> torch.Tensor:
    t = FUNCTIONS[activation](s.double())
    return (up.double() + ratio * t * p.double()) / (1 + ratio * t * t)


@EVERY_ACTIVATION
@pytest.mark.parametrize("ratio", [0.5, 10.0])
def test_close_to_the_best_of_a_whole_line_of_s(isa, generator, activation, ratio):
    p, up, gate, start = entries(generator, activation)
    z, s = gated_split(p, up, gate, start, activation, ratio)
    reached = objective(p, up, gate, z, s, activation, ratio)
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64).view(-1, 1, 1)
    everywhere = objective(p, up, gate, best_z(p, up, line, activation, ratio), line, activation, ratio).amin(0)
    before = objective(p, up, gate, up, start, activation, ratio)
    assert ((reached - everywhere) / before.mean()).mean() < 1e-2
    assert (reached <= everywhere + 1e-3 * before.mean()).double().mean() > 0.95


@EVERY_ACTIVATION
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_never_worse_than_the_start(isa, generator, activation, steps):
    p, up, gate, start = entries(generator, activation, size=3.0)
    z, s = gated_split(p, up, gate, start, activation, 2.0, steps)
    before = objective(p, up, gate, best_z(p, up, start, activation, 2.0), start, activation, 2.0)
    assert (objective(p, up, gate, z, s, activation, 2.0) <= before * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_is_where_autograd_says_that_the_slope_is_zero(isa, generator, activation):
    p, up, gate, start = entries(generator, activation)
    z, s = (v.double().requires_grad_() for v in gated_split(p, up, gate, start, activation, 0.5, steps=20))
    objective(p, up, gate, z, s, activation, 0.5).sum().backward()
    assert z.grad.abs().max() < 1e-5
    assert (s.grad.abs() < 2e-3).double().mean() > 0.99  # float32: half its digits decide whether a step still helps


@EVERY_ACTIVATION
def test_what_agrees_already_stays(isa, generator, activation):
    up, gate = torch.randn(2, 3, 50, generator=generator)
    p = FUNCTIONS[activation](gate) * up
    z, s = gated_split(p, up, gate, gate, activation, 1.0)
    torch.testing.assert_close(s, gate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_dtypes_are_rounded_once(isa, generator, dtype):
    given = [v.to(dtype) for v in entries(generator, "silu")]
    z, s = gated_split(*given, "silu")
    exact = gated_split(*(v.float() for v in given), "silu")
    assert z.dtype == s.dtype == dtype
    assert_rounded_once(z, exact[0])
    assert_rounded_once(s, exact[1])


@EVERY_ACTIVATION
def test_the_activation_is_torch_s(isa, activation):
    """With up = 0 and no steps s is the gate, so that z = ratio t p / (1 + ratio t^2) shows t = act(gate)."""
    gate = torch.linspace(-12, 12, 4001)[None]
    t = FUNCTIONS[activation](gate.double())
    p, zero = torch.full_like(gate, 1e-6), torch.zeros_like(gate)
    z, s = gated_split(p, zero, gate, gate, activation, 1e-3, 0)
    assert torch.equal(s, gate)
    expected = 1e-9 * t / (1 + 1e-3 * t * t)
    assert ((z.double() - expected).abs() <= 1e-9 * (3e-7 + 1e-6 * t.abs())).all()


def test_large_values_and_nan(isa):
    p, up, gate = (
        torch.tensor([[1e4, -1e4, math.nan, 1.0, 1.0]]),
        torch.tensor([[1.0, 300.0, 1, math.nan, 2.0]]),
        torch.full((1, 5), 90.0),
    )
    z, s = gated_split(p, up, gate, gate, "silu", 1.0)
    assert z[0, :2].isfinite().all() and s[0, :2].isfinite().all()
    assert z[0, 2:4].isnan().all() and s[0, 2:4].isnan().all()
    assert gated_split(*[torch.zeros(0, 3)] * 4, "silu")[0].shape == (0, 3)


def test_arguments_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"up: expected shape \(2, 3\), got \(2, 2\)"):
        gated_split(x, torch.zeros(2, 2), x, x)
    with pytest.raises(TypeError, match="gate: expected dtype float32, got bfloat16"):
        gated_split(x, x, x.bfloat16(), x)
    with pytest.raises(ValueError, match="activation: expected one of relu, silu, gelu, gelu_tanh, got 'tanh'"):
        gated_split(x, x, x, x, "tanh")
    with pytest.raises(ValueError, match="ratio: expected a number above 0, got 0"):
        gated_split(x, x, x, x, ratio=0.0)
    with pytest.raises(ValueError, match="ratio: expected a finite number, got inf"):
        gated_split(x, x, x, x, ratio=math.inf)
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        gated_split(x, x, x, x, steps=-1)
