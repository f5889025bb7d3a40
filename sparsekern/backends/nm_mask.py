from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    mask, status = torch.ops.sparsekern_cuda.nm_mask(scores.contiguous(), n, m)
    raise_if(status)
    return mask


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
