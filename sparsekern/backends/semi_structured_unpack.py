from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    weight, status = torch.ops.sparsekern_cuda.semi_structured_unpack(values.contiguous(), meta.contiguous())
    raise_if(status)
    return weight


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
