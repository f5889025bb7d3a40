"""`head_neuron_scores` on a CUDA device: two Triton kernels, and the check of their sums for NaN and Inf."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import refuse_not_finite, values_are_checked


def _triton(sum_squares: torch.Tensor, weight: torch.Tensor, head_size: int = 1) -> torch.Tensor:
    from ..triton_kernels import feature_norm, head_neuron_scores

    found = feature_norm.partial_sums(weight, row_mask=None, both=False)
    scores = head_neuron_scores.score(sum_squares, found.sums[:, 0], len(weight), head_size)
    # A NaN or Inf makes its sum not finite. So do weights whose squares overflow, which are not errors.
    if values_are_checked(weight) and int(found.suspect):
        refuse_not_finite(weight, None)
    return scores


IMPLEMENTATIONS = (Implementation("triton", _triton),)
