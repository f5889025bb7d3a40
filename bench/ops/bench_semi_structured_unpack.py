from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as pytorch_unpack

from sparsekern.ops import semi_structured_pack, semi_structured_unpack

from .bench_semi_structured_pack import pruned_weight

IMPLEMENTATIONS = {"sparsekern": semi_structured_unpack, "PyTorch": pytorch_unpack}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_semi_structured_unpack(measure, generator, name):
    weight = pruned_weight(4096, 4096, generator)
    values, meta = semi_structured_pack(weight)
    unpack = IMPLEMENTATIONS[name]
    assert torch.equal(unpack(values, meta), weight)
    measure(
        lambda: unpack(values, meta), group="semi_structured_unpack 4096x4096 bfloat16", bytes=values.nbytes + meta.nbytes, rounds=3
    )
