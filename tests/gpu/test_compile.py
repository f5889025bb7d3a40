"""torch.compile with CUDA graphs: warm-up, capture and replay give what the plain calls give."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ops

pytestmark = pytest.mark.gpu


def select(weight):
    mask = ops.nm_mask(weight.abs(), "2:4")
    values, meta = ops.semi_structured_pack(torch.where(mask, weight, 0.0))
    return ops.semi_structured_unpack(values, meta) * 2, ops.topk_mask(weight, weight.shape[1] // 2)


def sweep(weight, factor):
    new_weight, mask, error = ops.obs_sweep(weight, factor, "2:4")
    return new_weight * 2, mask, error


@pytest.mark.parametrize("function", [select, sweep], ids=lambda function: function.__name__)
def test_reduce_overhead(function, generator):
    torch._dynamo.reset()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(300, 256, generator=generator)
    factor = torch.linalg.cholesky((x.T @ x).flip(0, 1)).flip(0, 1).contiguous().cuda()
    for _ in range(4):
        weight = torch.randn(64, 256, generator=generator).bfloat16().cuda()
        arguments = (weight,) if function is select else (weight, factor)
        torch.compiler.cudagraph_mark_step_begin()
        for got, want in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
