"""`masked_adamw_` on a CUDA device: the Triton kernel on contiguous tensors, and the check of its status."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import BadValues, values_are_checked


def _triton(
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
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    anchor: torch.Tensor | None = None,
    pull: float = 0.0,
    half: torch.Tensor | None = None,
) -> None:
    from ..triton_kernels import masked_adamw

    state = [value.contiguous() for value in (weight, exp_avg, exp_avg_sq)]
    copy = None if half is None else half.contiguous()
    suspect = masked_adamw.masked_adamw_(
        state[0], grad.contiguous(), state[1], state[2],
        step=step, lr=lr, mask=None if mask is None else mask.contiguous(), beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, grad_scale=grad_scale, anchor=None if anchor is None else anchor.contiguous(), pull=pull, half=copy,
    )  # fmt: skip
    if values_are_checked(weight) and int(suspect):
        raise BadValues("grad: expected finite values")
    for value, new in zip((weight, exp_avg, exp_avg_sq), state, strict=True):
        if new is not value:
            value.copy_(new)
    if half is not None and copy is not None and copy is not half:
        half.copy_(copy)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
