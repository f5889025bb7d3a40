from __future__ import annotations

import torch

from .table import Implementation
from .values import BadValues, raise_if


def _cuda(values: torch.Tensor, bitmask: torch.Tensor, features: int) -> torch.Tensor:
    values, bitmask = values.contiguous(), bitmask.contiguous()
    if bitmask.numel() == 0 and values.numel() != 0:
        raise BadValues("values: expected none, since no kernel runs where there are no bits")
    raw = torch.ops.sparsekern_cuda
    counts, status = raw.bitmask_count(bitmask, features)
    weight = raw.bitmask_expand(values, bitmask, counts.cumsum(0), features, status)
    raise_if(status)
    return weight


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
