from __future__ import annotations

import torch

from sparsekern.ops import bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_unpack import reference

from .bench_bitmask_linear import sparse_weight
from .bench_bitmask_pack import DTYPES


@DTYPES
def test_bitmask_unpack(measure, generator, dtype):
    weight = sparse_weight((4096, 4096), 0.5, dtype, generator)
    packed = bitmask_pack(weight)
    assert torch.equal(bitmask_unpack(**packed, features=4096), weight)
    measure(
        lambda: bitmask_unpack(**packed, features=4096),
        group=f"bitmask_unpack 50% zeros, 4096x4096 {str(dtype).removeprefix('torch.')}",
        bytes=weight.nbytes + sum(tensor.nbytes for tensor in packed.values()),
        rounds=5,
        against=lambda: reference(**packed, features=4096),
        baseline="torch indexing",
        goal=5.0,
    )
