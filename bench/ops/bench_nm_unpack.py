from __future__ import annotations

import torch

from sparsekern.ops import nm_pack, nm_unpack
from sparsekern.ops.nm_unpack import reference

from .bench_nm_linear import nm_weight
from .bench_nm_pack import PATTERNS


@PATTERNS
def test_nm_unpack(measure, generator, pattern):
    n, m = map(int, pattern.split(":"))
    weight = nm_weight((4096, 4096), pattern, torch.bfloat16, generator)
    packed = nm_pack(weight, n, m)
    assert torch.equal(nm_unpack(**packed, n=n, m=m, features=4096), weight)
    measure(
        lambda: nm_unpack(**packed, n=n, m=m, features=4096),
        group=f"nm_unpack {pattern} 4096x4096 bfloat16",
        bytes=weight.nbytes + sum(tensor.nbytes for tensor in packed.values()),
        rounds=5,
        against=lambda: reference(**packed, n=n, m=m, features=4096),
        baseline="torch indexing",
        goal=5.0,
    )
