"""The divergence of a model from its teacher, as a function that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops


def divergence(
    hidden: torch.Tensor, head: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the sum of `ops.linear_kl` over the tokens, with its gradient for `hidden`.

    Args:
        hidden: `[tokens, features]`, the student's hidden states in front of its head.
        head: `[vocabulary, features]`; it has no gradient.
        teacher_hidden: `[tokens, teacher_features]`.
        teacher_head: `[vocabulary, teacher_features]`.
        temperature: divisor of the logits.

    Raises:
        ValueError: see `ops.linear_kl`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        teacher_hidden = teacher_hidden.detach().to(teacher_head.dtype)
        return _Divergence.apply(hidden, head.detach(), teacher_hidden, teacher_head.detach(), temperature)


def divergence_of_logits(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the same sum from stored logits `[tokens, vocabulary]`, for models that change them behind the head."""
    student, teacher = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


class _Divergence(torch.autograd.Function):
    """`linear_kl`, whose forward already makes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        kl, grad = ops.linear_kl(hidden.detach().to(head.dtype), head, teacher_hidden, teacher_head, temperature)
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return kl.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), None, None, None, None
