from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(scores: torch.Tensor, k: int, *, scope: str = "row") -> torch.Tensor:
    mask, status = torch.ops.sparsekern_cuda.topk_mask(scores.contiguous(), k, scope == "matrix")
    raise_if(status)
    return mask


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
