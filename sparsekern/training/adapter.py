"""Merging a low-rank adapter into a pruned weight."""

from __future__ import annotations

import torch


@torch.no_grad()
def merge_adapter(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> None:
    """Add a LoRA adapter to a pruned weight in place, `weight += scale * up @ down`, where `weight` is not zero.

    The product is dense: what it adds to the pruned weights is lost, so judge the merged model by itself. Computed in float32 and
    rounded once.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16; its zeros (`-0.0` too) stay zero.
        down: `[rank, in_features]`, the adapter's A.
        up: `[out_features, rank]`, the adapter's B.
        scale: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` for rank-stabilised adapters.

    Raises:
        ValueError: shapes that do not fit, or a sum that is not finite; `weight` is then unchanged.

    Source: Hu et al., LoRA: Low-rank adaptation of large language models, 2021, section 4.1 (`W + B A`).
    """
    fits = weight.dim() == down.dim() == up.dim() == 2 and up.shape[1] == down.shape[0]
    if not fits or weight.shape != (up.shape[0], down.shape[1]):
        shapes = f"weight {tuple(weight.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise ValueError(f"merge_adapter: expected weight [out, in], down [rank, in] and up [out, rank], got {shapes}")
    merged = torch.addmm(weight.float(), up.float(), down.float(), alpha=scale).masked_fill_(weight == 0, 0).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"merge_adapter: expected a finite sum in {str(weight.dtype).removeprefix('torch.')}, got NaN or Inf")
    weight.copy_(merged)
