from __future__ import annotations

import torch

from .table import Implementation
from .values import raise_if


def _cuda(weight: torch.Tensor, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    scores = None if scores is None else scores.contiguous()
    values, meta, status = torch.ops.sparsekern_cuda.semi_structured_prune_pack(weight.contiguous(), scores)
    raise_if(status)
    return values, meta


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
