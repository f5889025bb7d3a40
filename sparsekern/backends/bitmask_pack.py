from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.contiguous()
    raw = torch.ops.sparsekern_cuda
    bitmask, counts, status = raw.bitmask_mark(weight)
    ends = counts.cumsum(0)
    # The size of the result depends on the data, so the host has to wait for it: this op cannot be captured in a CUDA graph.
    count = int(ends[-1]) if len(ends) else 0
    values = raw.bitmask_gather(weight, ends, count)
    raise_if(status)
    return values, bitmask


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
