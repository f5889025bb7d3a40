"""Merge a low-rank adapter into a pruned weight."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite_number, check_tensor


@torch.no_grad()
def merge_adapter_(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> None:
    """Add a LoRA adapter to a pruned weight in place, `weight += scale * up @ down`, where `weight` is not zero.

    The product is dense: what it would add to pruned weights is lost, so evaluate the merged model. The sum is computed in float32 and
    rounded once.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16; its zeros (`-0.0` too) stay zero.
        down: `[rank, in_features]`, the adapter's A.
        up: `[out_features, rank]`, the adapter's B.
        scale: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` for rank-stabilised adapters.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: shapes or devices differ, `scale` is not finite, or the sum is not finite. `weight` is then unchanged.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> sparsekern.merge_adapter_(weight, down=torch.ones(1, 2), up=torch.ones(2, 1), scale=0.5)
        >>> weight
        tensor([[0.0000, 1.5000],
                [2.5000, 0.0000]])

    Source: Hu et al., LoRA: Low-rank adaptation of large language models, 2021, section 4.1 (`W + B A`).
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    check_tensor("down", down, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, weight.shape[1]), device=weight.device)
    check_tensor("up", up, ndim=2, dtypes=HALF_OR_FLOAT, shape=(weight.shape[0], down.shape[0]), device=weight.device)
    check_finite_number("scale", scale)
    merged = torch.addmm(weight.float(), up.float(), down.float(), alpha=scale).masked_fill_(weight == 0, 0).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"weight: expected a finite sum with the adapter in {str(weight.dtype).removeprefix('torch.')}, got NaN or Inf"
        )
    weight.copy_(merged)
