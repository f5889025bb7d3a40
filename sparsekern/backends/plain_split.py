from __future__ import annotations

import torch

from .devices import needs_capability
from .table import Implementation, Support


def _triton(
    activated: torch.Tensor,
    preactivation: torch.Tensor,
    start: torch.Tensor,
    activation: str,
    ratio: float = 1.0,
    steps: int = 4,
) -> torch.Tensor:
    from ..triton_kernels.plain_split import plain_split

    return plain_split(activated, preactivation, start, activation, ratio, steps)


def _supports(activated: torch.Tensor, *args, **kwargs) -> Support:
    return needs_capability(activated, (8, 0))


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
