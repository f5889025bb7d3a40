from __future__ import annotations

import pytest
import torch

from sparsekern.ops import bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_unpack import reference

from .bench_bitmask_pack import DTYPES, half_zeros

IMPLEMENTATIONS = {"sparsekern": bitmask_unpack, "plain PyTorch": reference}


@DTYPES
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bitmask_unpack(measure, generator, name, dtype):
    weight = half_zeros(dtype, generator)
    values, bitmask = bitmask_pack(weight)
    unpack = IMPLEMENTATIONS[name]
    assert torch.equal(unpack(values, bitmask, 4096), weight)
    group = f"bitmask_unpack 4096x4096 {str(dtype).removeprefix('torch.')} 50 %"
    measure(lambda: unpack(values, bitmask, 4096), group=group, bytes=values.nbytes + bitmask.nbytes, rounds=3)
