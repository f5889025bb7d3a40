from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, meta, status = torch.ops.sparsekern_cuda.semi_structured_pack(weight.contiguous())
    raise_if(status)
    return values, meta


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
