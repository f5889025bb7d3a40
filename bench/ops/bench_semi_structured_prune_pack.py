from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pytorch_pack

from sparsekern.ops import nm_mask, semi_structured_pack, semi_structured_prune_pack


def three_ops(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return semi_structured_pack(weight.masked_fill(~nm_mask(weight.abs()), 0))


def pytorch(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.view(-1, 4)
    dropped = groups.abs().topk(2, dim=1, largest=False, sorted=False)[1]
    return pytorch_pack(groups.scatter(1, dropped, 0).view_as(weight))


IMPLEMENTATIONS = {"sparsekern": semi_structured_prune_pack, "sparsekern, three ops": three_ops, "PyTorch": pytorch}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_semi_structured_prune_pack(measure, generator, name):
    ranks = torch.rand(4096, 1024, 4, generator=generator).argsort(-1).view(4096, 4096)
    weight = (ranks + torch.rand(4096, 4096, generator=generator) / 2).bfloat16()  # no two of a group are equal
    prune_pack = IMPLEMENTATIONS[name]
    assert all(torch.equal(got, want) for got, want in zip(prune_pack(weight), three_ops(weight), strict=True))
    measure(lambda: prune_pack(weight), group="semi_structured_prune_pack 4096x4096 bfloat16", bytes=weight.nbytes, rounds=3)
