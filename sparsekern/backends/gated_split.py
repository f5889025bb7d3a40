from __future__ import annotations

import torch

from .devices import needs_capability
from .table import Implementation, Support


def _triton(
    activated: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    start: torch.Tensor,
    activation: str,
    ratio: float = 1.0,
    steps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.gated_split import gated_split

    return gated_split(activated, up, gate, start, activation, ratio, steps)


def _supports(activated: torch.Tensor, *args, **kwargs) -> Support:
    return needs_capability(activated, (8, 0))


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
