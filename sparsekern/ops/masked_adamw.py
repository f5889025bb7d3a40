"""`masked_adamw_`: one step of AdamW on the kept weights of a pruned tensor."""

from __future__ import annotations

import math

import torch

from .._checks import HALF_OR_FLOAT, check_finite_number, check_tensor, check_whole
from ._registry import define_op, sample

SCHEMA = (
    "(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, int step, float lr, Tensor? mask=None, "
    "float beta1=0.9, float beta2=0.999, float eps=1e-08, float weight_decay=0.0, float grad_scale=1.0, Tensor? anchor=None, "
    "float pull=0.0, Tensor(d!)? half=None) -> ()"
)
FLOAT, HALF = (torch.float32,), (torch.bfloat16, torch.float16)


def masked_adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    mask: torch.Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    anchor: torch.Tensor | None = None,
    pull: float = 0.0,
    half: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one step of AdamW on the kept weights of a tensor, in place and in one pass over memory.

    Where `mask` is True, with `t = step`:

        g = grad_scale * grad + pull * (weight - anchor)      # the second term only with an anchor
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        weight = (1 - lr * weight_decay) * weight
        weight -= lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

    Where it is False, weight and moments become exactly 0, whatever `grad` holds there. A pruned weight neither moves nor decays.

    Args:
        weight: float32 of any shape and strides, updated in place.
        grad: float32, bfloat16 or float16 of the shape of `weight`.
        exp_avg: float32 of that shape: the first moment, updated in place.
        exp_avg_sq: float32 of that shape: the second moment, updated in place.
        step: number of this step, from 1 on.
        lr: learning rate.
        mask: bool of that shape, True where a weight is kept. None keeps all.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the weights, as a share of `lr`.
        grad_scale: factor of the gradient, such as that of clipping by norm.
        anchor: float32 of that shape, where the proximal term `pull / 2 * |weight - anchor|^2` is zero. None leaves the term out.
        pull: weight of the proximal term. It needs an anchor.
        half: bfloat16 or float16 of that shape, which receives a copy of the new weight. None makes no copy.

    Returns:
        `weight`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or number, a `pull` without an anchor, or NaN or Inf in the gradient of a kept weight. `weight`,
            the moments and `half` are then undefined.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.
    """
    check_tensor("weight", weight, ndim=weight.dim() if isinstance(weight, torch.Tensor) else 0, dtypes=FLOAT)
    others: tuple[tuple[str, torch.Tensor | None, tuple[torch.dtype, ...]], ...] = (
        ("grad", grad, HALF_OR_FLOAT),
        ("exp_avg", exp_avg, FLOAT),
        ("exp_avg_sq", exp_avg_sq, FLOAT),
        ("mask", mask, (torch.bool,)),
        ("anchor", anchor, FLOAT),
        ("half", half, HALF),
    )
    for name, value, dtypes in others:
        if value is not None or name in ("grad", "exp_avg", "exp_avg_sq"):
            check_tensor(name, value, ndim=weight.dim(), dtypes=dtypes, shape=tuple(weight.shape), device=weight.device)  # type: ignore[arg-type]
    check_whole("step", step, 1)
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("pull", pull)):
        check_finite_number(name, number, 0)
    check_finite_number("grad_scale", grad_scale)
    for name, number in (("beta1", beta1), ("beta2", beta2)):
        check_finite_number(name, number, 0)
        if number >= 1:
            raise ValueError(f"{name}: expected a number below 1, got {number}")
    if pull and anchor is None:
        raise ValueError(f"pull: expected 0 without an anchor, got {pull}")
    _op(
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        mask=mask,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        anchor=anchor,
        pull=pull,
        half=half,
    )
    return weight


def reference(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    mask: torch.Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    anchor: torch.Tensor | None = None,
    pull: float = 0.0,
    half: torch.Tensor | None = None,
) -> None:
    gradient = grad.float() * grad_scale
    if anchor is not None:
        gradient = gradient + pull * (weight - anchor)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    gradient = gradient.masked_fill(~kept, 0)
    _check_finite(gradient, weight, grad, anchor)
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1).masked_fill_(~kept, 0)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).masked_fill_(~kept, 0)
    root = exp_avg_sq.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(eps)
    # A pruned weight of NaN becomes 0 too: it is overwritten, not multiplied.
    weight.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step)).masked_fill_(~kept, 0)
    if half is not None:
        half.copy_(weight)


def _check_finite(gradient: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, anchor: torch.Tensor | None) -> None:
    """Raise `ValueError` naming the first kept gradient that is not finite, and the argument that it comes from."""
    bad = ~torch.isfinite(gradient)
    if not bad.any():
        return
    columns = weight.shape[-1] if weight.dim() else 1
    index = int(bad.reshape(-1).nonzero()[0])
    at = {"grad": grad.reshape(-1)[index]}
    if anchor is not None:
        at |= {"weight": weight.reshape(-1)[index], "anchor": anchor.reshape(-1)[index]}
    name = next((name for name, value in at.items() if not torch.isfinite(value)), "grad")
    value = float(at[name] if not torch.isfinite(at[name]) else gradient.reshape(-1)[index])
    raise ValueError(f"{name}: expected finite values, got {value} at [{index // columns}, {index % columns}]")


def _fake(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    step,
    lr,
    mask=None,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    grad_scale=1.0,
    anchor=None,
    pull=0.0,
    half=None,
) -> None:
    for value in (grad, exp_avg, exp_avg_sq, mask, anchor, half):
        torch._check(value is None or value.shape == weight.shape)


def _samples(generator: torch.Generator):
    for shape, dtype in (((5, 48), torch.float32), ((33, 7), torch.bfloat16), ((1500,), torch.float16), ((3, 2, 5), torch.float32)):
        weight, grad, exp_avg = (torch.randn(shape, generator=generator) for _ in range(3))
        exp_avg_sq, mask = exp_avg**2 + 0.1, grad > 0
        half = torch.zeros(shape, dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16)
        grad = grad.to(dtype)
        yield sample(weight, grad, exp_avg, exp_avg_sq, step=3, lr=0.01)
        yield sample(weight, grad, exp_avg, exp_avg_sq, step=1, lr=0.01, mask=mask, weight_decay=0.1, half=half, grad_scale=0.5)
        yield sample(weight, grad, exp_avg, exp_avg_sq, step=9, lr=0.1, mask=mask, beta2=0.95, anchor=weight * 0.5, pull=0.25)


_op = define_op("masked_adamw_", SCHEMA, reference=reference, fake=_fake, samples=_samples)
