from __future__ import annotations

import pytest
import torch

from sparsekern.ops import bitmask_pack
from sparsekern.ops.bitmask_pack import reference

from .bench_bitmask_linear import sparse_weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("zeros", [0.5, 0.7])
def test_bitmask_pack(measure, generator, zeros, dtype):
    weight = sparse_weight((4096, 4096), zeros, dtype, generator)
    packed = bitmask_pack(weight)
    assert all(torch.equal(got, want) for got, want in zip(packed.values(), reference(weight), strict=True))
    measure(
        lambda: bitmask_pack(weight),
        group=f"bitmask_pack {zeros:.0%} zeros, 4096x4096 {str(dtype).removeprefix('torch.')}",
        bytes=2 * weight.nbytes + sum(tensor.nbytes for tensor in packed.values()),
        rounds=5,
        against=lambda: reference(weight),
        baseline="torch indexing",
        goal=5.0,
    )
