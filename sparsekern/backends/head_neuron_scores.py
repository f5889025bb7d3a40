from __future__ import annotations

import torch

from .devices import needs_capability, refuse_not_finite
from .table import Implementation, Support
from .values import values_are_checked


def _triton(sum_squares: torch.Tensor, weight: torch.Tensor, head_size: int = 1) -> torch.Tensor:
    from ..triton_kernels import feature_norm, head_neuron_scores

    found = feature_norm.partial_sums(weight, row_mask=None, both=False)
    scores = head_neuron_scores.score(sum_squares, found.sums[:, 0], len(weight), head_size)
    # A NaN or Inf makes a sum one too; so may weights that are too large to be squared, which are no error.
    if values_are_checked(weight) and int(found.suspect):
        refuse_not_finite(weight, None)
    return scores


def _supports(sum_squares: torch.Tensor, *args, **kwargs) -> Support:
    return needs_capability(sum_squares, (8, 0))


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
