from __future__ import annotations

import pytest
import torch

from sparsekern.ops import plain_split
from sparsekern.ops.plain_split import reference

TOKENS, FEATURES = 4096, 4096
IMPLEMENTATIONS = {
    "sparsekern": lambda p, m: plain_split(p, m, m, "relu"),
    "the same in PyTorch": lambda p, m: reference(p, m, m, "relu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_plain_split(measure, generator, name, dtype):
    p, m = torch.randn(2, TOKENS, FEATURES, generator=generator).to(dtype)
    z = IMPLEMENTATIONS[name](p, m)
    torch.testing.assert_close(z, reference(p, m, m, "relu"))
    group = f"plain_split, ReLU [{TOKENS}, {FEATURES}] {str(dtype).removeprefix('torch.')}"
    measure(lambda: IMPLEMENTATIONS[name](p, m), group=group, bytes=3 * p.nbytes, rounds=3)
