"""`gated_split`: the auxiliary activations of a gated feed-forward network, entry by entry (SparseLLM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._activations import activate_with_slope, check_activation
from .._checks import HALF_OR_FLOAT, check_finite_number, check_tensor, check_whole
from ._registry import define_op, sample

SCHEMA = (
    '(Tensor activated, Tensor up, Tensor gate, Tensor start, str activation="silu", float ratio=1.0, int steps=4) '
    "-> (Tensor z, Tensor s)"
)
STARTS = (-1.25, 0.0, 1.0, 3.0)  # as in csrc/cpu/split.h


def gated_split(
    activated: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    start: torch.Tensor,
    activation: str = "silu",
    ratio: float = 1.0,
    steps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs `z` and `s` of the up and gate projections that minimise an objective in every entry.

    The objective is `ratio (p - act(s) z)^2 + (z - up)^2 + (s - gate)^2`. Its minimum agrees best with the wanted input `p = activated`
    of the down projection, and with the given outputs of the projections.

    For a given `s` the best `z` is `(up + ratio act(s) p) / (1 + ratio act(s)^2)`, which leaves a function of `s` alone. That function
    is not convex. The best of a few starting points, `start` and `gate` among them, is improved by `steps` Gauss-Newton steps, each
    taken only if it lowers the objective. The result is therefore never worse than any `z` with `start`.

    Args:
        activated: `p`, `[tokens, features]` float32, bfloat16 or float16. Arithmetic is float32.
        up: output of the up projection, shape and dtype of `activated`.
        gate: output of the gate projection, shape and dtype of `activated`.
        start: initial `s`, shape and dtype of `activated`: the value of the previous round.
        activation: `"silu"`, `"gelu"` (by the error function), `"gelu_tanh"` or `"relu"`, applied to the gate.
        ratio: gamma / alpha, the weight of the first term relative to the others, above 0.
        steps: Gauss-Newton steps, at least 0.

    Returns:
        `(z, s)`, each of the shape and dtype of `activated`. NaN in an entry gives NaN in that entry.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, activation, ratio or number of steps.

    Source: Bai et al., SparseLLM, 2024, the z- and s-updates of the LLaMA form. The paper alternates them, with two gradient steps for
    s; here they are solved together.
    """
    check_tensor("activated", activated, ndim=2, dtypes=HALF_OR_FLOAT)
    for name, value in (("up", up), ("gate", gate), ("start", start)):
        check_tensor(name, value, ndim=2, dtypes=(activated.dtype,), shape=tuple(activated.shape), device=activated.device)
    check_split(activation, ratio, steps)
    return _op(activated, up, gate, start, activation, ratio, steps)


def check_split(activation: str, ratio: float, steps: int) -> None:
    """Raise `TypeError` or `ValueError` unless the settings of a split are valid."""
    check_activation(activation)
    check_finite_number("ratio", ratio)
    if ratio <= 0:
        raise ValueError(f"ratio: expected a number above 0, got {ratio}")
    check_whole("steps", steps, 0)


class Fit(NamedTuple):
    """The misfit of an activation `t`.

    Attributes:
        value: the misfit.
        gradient: derivative of half the value with respect to `t`.
        curvature: Gauss-Newton approximation of the second derivative of half the value.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    curvature: torch.Tensor


def search(
    fit: Callable[[torch.Tensor], Fit],
    gate: torch.Tensor,
    start: torch.Tensor,
    wanted: torch.Tensor,
    activation: str,
    ratio: float,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `s` that minimises `ratio * fit(act(s)) + (s - gate)^2`, and `act(s)`, by the algorithm of csrc/cpu/split.h."""
    s = start
    t, slope = activate_with_slope(s, activation)
    objective = ratio * fit(t).value + (s - gate).square()

    def take(place: torch.Tensor) -> torch.Tensor:
        nonlocal s, t, slope, objective
        value_there, slope_there = activate_with_slope(place, activation)
        there = ratio * fit(value_there).value + (place - gate).square()
        better = there < objective
        s, t, slope = torch.where(better, place, s), torch.where(better, value_there, t), torch.where(better, slope_there, slope)
        objective = torch.where(better, there, objective)
        return better

    take(gate)
    take(wanted)
    for place in STARTS:
        take(torch.full_like(gate, place))
    length = torch.ones_like(gate)
    for _ in range(steps):
        found = fit(t)
        gradient = s - gate + ratio * found.gradient * slope
        curvature = 1 + ratio * found.curvature * slope.square()
        better = take(s - length * gradient / curvature)
        length = torch.where(better, (2 * length).clamp_(max=1), length / 4)
    return torch.where(objective.isnan(), objective, s), t


def reference(
    activated: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    start: torch.Tensor,
    activation: str = "silu",
    ratio: float = 1.0,
    steps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    p, u = activated.float(), up.float()

    def fit(t: torch.Tensor) -> Fit:
        scale, miss = 1 / (1 + ratio * t * t), p - t * u
        z = (u + ratio * t * p) * scale
        return Fit(miss * miss * scale, -miss * scale * z, z * z * scale)

    wanted = p / u
    wanted = torch.where(wanted > 0, wanted, 0.0)  # 0 / 0 is NaN, which is not above 0
    s, t = search(fit, gate.float(), start.float(), wanted, activation, ratio, steps)
    z = (u + ratio * t * p) / (1 + ratio * t * t)
    return _as(z, activated), _as(s, activated)


def _as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _fake(activated, up, gate, start, activation="silu", ratio=1.0, steps=4):
    torch._check(activated.dim() == 2 and activated.shape == up.shape == gate.shape == start.shape)
    z = torch.empty_like(activated, memory_format=torch.contiguous_format)
    return z, torch.empty_like(z)


def _samples(generator: torch.Generator):
    for tokens, features, dtype, activation in (
        (1, 1, torch.float32, "silu"),
        (7, 37, torch.float32, "gelu_tanh"),
        (4, 50, torch.bfloat16, "gelu"),
        (3, 64, torch.float16, "silu"),
        (5, 33, torch.float32, "relu"),
    ):
        up, gate, noise, start = torch.randn(4, tokens, features, generator=generator)
        activated = activate_with_slope(gate, activation)[0] * up + 0.1 * noise
        yield sample(*(v.to(dtype) for v in (activated, up, gate, gate + 0.05 * start)), activation, 0.5, 4)


_op = define_op("gated_split", SCHEMA, reference=reference, fake=_fake, samples=_samples)
