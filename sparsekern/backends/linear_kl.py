"""`linear_kl` on a CUDA device: products of cuBLAS for a few tokens at a time, and a Triton kernel between them."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .products import full_float32
from .values import BadValues, values_are_checked

LOGITS = 2**28  # float32 logits of one side that are in memory at once, 1 GiB; fewer where this is more than all


def _triton(
    x: torch.Tensor, head: torch.Tensor, teacher_x: torch.Tensor, teacher_head: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.linear_kl import compare_logits

    tokens = len(x)
    group = max(1, min(tokens, LOGITS // len(head)))
    kl, grad = x.new_empty(tokens, dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)
    with full_float32():
        for begin in range(0, tokens, group):
            part = slice(begin, begin + group)
            student, teacher = _product(x[part], head.T), _product(teacher_x[part], teacher_head.T)
            change = student if head.dtype == torch.float32 else torch.empty_like(student, dtype=head.dtype)
            kl[part] = compare_logits(student, teacher, change, temperature)
            grad[part] = _product(change, head)
    if values_are_checked(x) and not kl.isfinite().all():
        raise BadValues("x: expected finite logits")
    return kl, grad


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right` in float32; 16-bit operands are multiplied on the tensor cores and accumulated in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
