from __future__ import annotations

import pytest
import torch

from sparsekern.ops import nm_pack
from sparsekern.ops.nm_pack import reference

from .bench_nm_linear import nm_weight

PATTERNS = pytest.mark.parametrize("pattern", ["2:4", "4:8"])


@PATTERNS
def test_nm_pack(measure, generator, pattern):
    n, m = map(int, pattern.split(":"))
    weight = nm_weight((4096, 4096), pattern, torch.bfloat16, generator)
    packed = nm_pack(weight, n, m)
    assert all(torch.equal(got, want) for got, want in zip(packed.values(), reference(weight, n, m), strict=True))
    measure(
        lambda: nm_pack(weight, n, m),
        group=f"nm_pack {pattern} 4096x4096 bfloat16",
        bytes=weight.nbytes + sum(tensor.nbytes for tensor in packed.values()),
        rounds=5,
        against=lambda: reference(weight, n, m),
        baseline="torch indexing",
        goal=5.0,
    )
