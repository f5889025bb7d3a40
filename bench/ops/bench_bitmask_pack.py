from __future__ import annotations

import pytest
import torch

from sparsekern.ops import bitmask_pack
from sparsekern.ops.bitmask_pack import reference

IMPLEMENTATIONS = {"sparsekern": bitmask_pack, "plain PyTorch": reference}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def half_zeros(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(4096, 4096, generator=generator).clamp_min(0).to(dtype)


@DTYPES
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bitmask_pack(measure, generator, name, dtype):
    weight = half_zeros(dtype, generator)
    pack = IMPLEMENTATIONS[name]
    assert all(torch.equal(got, want) for got, want in zip(pack(weight), reference(weight), strict=True))
    group = f"bitmask_pack 4096x4096 {str(dtype).removeprefix('torch.')} 50 %"
    measure(lambda: pack(weight), group=group, bytes=weight.nbytes, rounds=3)
