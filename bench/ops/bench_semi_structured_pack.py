from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pytorch_pack

from sparsekern.ops import nm_mask, semi_structured_pack

IMPLEMENTATIONS = {"sparsekern": semi_structured_pack, "PyTorch": pytorch_pack}


def pruned_weight(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(nm_mask(weight.abs()), weight, torch.zeros(())).bfloat16()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_semi_structured_pack(measure, generator, name):
    weight = pruned_weight(4096, 4096, generator)
    pack = IMPLEMENTATIONS[name]
    assert all(torch.equal(got, want) for got, want in zip(pack(weight), pytorch_pack(weight), strict=True))
    measure(lambda: pack(weight), group="semi_structured_pack 4096x4096 bfloat16", bytes=weight.nbytes, rounds=3)
