"""`plain_split`: the auxiliary pre-activations of a feed-forward network without a gate, entry by entry (SparseLLM)."""

from __future__ import annotations

import torch

from .._activations import activate_with_slope
from .._checks import HALF_OR_FLOAT, check_tensor
from ._registry import define_op, sample
from .gated_split import Fit, check_split, search

SCHEMA = '(Tensor activated, Tensor preactivation, Tensor start, str activation="relu", float ratio=1.0, int steps=4) -> Tensor'


def plain_split(
    activated: torch.Tensor,
    preactivation: torch.Tensor,
    start: torch.Tensor,
    activation: str = "relu",
    ratio: float = 1.0,
    steps: int = 4,
) -> torch.Tensor:
    """Return the pre-activation `z` that minimises `ratio (p - act(z))^2 + (z - m)^2` in every entry.

    `p = activated` is the wanted input of the second projection, and `m = preactivation` the output of the first. For ReLU the result is
    exact: on either side of zero the objective is a parabola, and the lower of the two minima is taken (of equal ones, that of the active
    side). For smooth activations it is searched as in `gated_split`, and is never worse than `start`.

    Args:
        activated: `p`, `[tokens, features]` float32, bfloat16 or float16. Arithmetic is float32.
        preactivation: `m`, shape and dtype of `activated`.
        start: initial `z`, shape and dtype of `activated`: the value of the previous round. Ignored for ReLU.
        activation: `"relu"`, `"silu"`, `"gelu"` (by the error function) or `"gelu_tanh"`.
        ratio: gamma / alpha, the weight of the first term relative to the second, above 0.
        steps: Gauss-Newton steps, at least 0. Ignored for ReLU.

    Returns:
        `z`, of the shape and dtype of `activated`. NaN in an entry gives NaN in that entry.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, activation, ratio or number of steps.

    Source: Bai et al., SparseLLM, 2024, the z-update of the OPT form.
    """
    check_tensor("activated", activated, ndim=2, dtypes=HALF_OR_FLOAT)
    for name, value in (("preactivation", preactivation), ("start", start)):
        check_tensor(name, value, ndim=2, dtypes=(activated.dtype,), shape=tuple(activated.shape), device=activated.device)
    check_split(activation, ratio, steps)
    return _op(activated, preactivation, start, activation, ratio, steps)


def reference(
    activated: torch.Tensor,
    preactivation: torch.Tensor,
    start: torch.Tensor,
    activation: str = "relu",
    ratio: float = 1.0,
    steps: int = 4,
) -> torch.Tensor:
    p, m = activated.float(), preactivation.float()
    if activation == "relu":
        active, silent = ((ratio * p + m) * (1 / (1 + ratio))).clamp(min=0), m.clamp(max=0)
        active_cost = ratio * (p - active).square() + (active - m).square()
        z = torch.where(ratio * p.square() + (silent - m).square() < active_cost, silent, active)
    else:
        z, _ = search(
            lambda t: Fit((p - t).square(), t - p, torch.ones_like(t)), m, start.float(), p.clamp(min=0), activation, ratio, steps
        )
    return z.to(activated.dtype, memory_format=torch.contiguous_format, copy=True)


def _fake(activated, preactivation, start, activation="relu", ratio=1.0, steps=4):
    torch._check(activated.dim() == 2 and activated.shape == preactivation.shape == start.shape)
    return torch.empty_like(activated, memory_format=torch.contiguous_format)


def _samples(generator: torch.Generator):
    for tokens, features, dtype, activation in (
        (1, 1, torch.float32, "relu"),
        (7, 37, torch.float32, "relu"),
        (4, 50, torch.bfloat16, "gelu"),
        (3, 64, torch.float16, "relu"),
        (5, 33, torch.float32, "gelu_tanh"),
        (5, 33, torch.float32, "silu"),
    ):
        given, noise, start = torch.randn(3, tokens, features, generator=generator)
        activated = activate_with_slope(given, activation)[0] + 0.1 * noise
        yield sample(*(v.to(dtype) for v in (activated, given, given + 0.05 * start)), activation, 0.5, 4)


_op = define_op("plain_split", SCHEMA, reference=reference, fake=_fake, samples=_samples)
