from __future__ import annotations

import torch

from .table import Implementation


def _cuda(gram: torch.Tensor) -> None:
    dense = gram.contiguous()
    torch.ops.sparsekern_cuda.gram_symmetrize_(dense)
    if dense is not gram:
        gram.copy_(dense)


IMPLEMENTATIONS = (Implementation("cuda", _cuda),)
