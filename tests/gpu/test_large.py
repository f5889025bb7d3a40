"""Tensors of more than 2^31 elements, where an index of 32 bits would wrap around. What is expected is known for a few rows."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ops
from sparsekern.ops.semi_structured_pack import sparse_weight

pytestmark = pytest.mark.gpu

COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 64
FEW = 64  # rows that are looked at, the last of which lie beyond


@pytest.fixture
def device_generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def matrix(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.bfloat16, device="cuda")


def test_nm_mask_and_topk_mask_by_row(room, device_generator):
    room(16)
    scores = matrix(device_generator)
    for select in (lambda s: ops.nm_mask(s, "2:4"), lambda s: ops.topk_mask(s, 1000)):
        mask = select(scores)
        assert torch.equal(mask[-FEW:], select(scores[-FEW:].clone())) and torch.equal(mask[:FEW], select(scores[:FEW].clone()))
        del mask


def test_topk_mask_of_all(room):
    room(16)
    scores = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda")
    scores[-1] = scores[0] = 1
    mask = ops.topk_mask(scores, 2 * COLUMNS, scope="matrix")
    assert mask[0].all() and mask[-1].all() and not mask[1:-1].any()
    mask = ops.topk_mask(scores, 2 * COLUMNS + 5, scope="matrix")  # of the equal ones, the first
    assert mask[1, :5].all() and mask.sum() == 2 * COLUMNS + 5


def test_packing_comes_back(room, generator):
    room(40)
    weight = sparse_weight(FEW, COLUMNS, torch.bfloat16, generator).cuda().repeat(ROWS // FEW, 1)
    values, meta = ops.semi_structured_pack(weight)
    assert torch.equal(ops.semi_structured_unpack(values, meta), weight)


def test_statistics(room, device_generator):
    room(16)
    x = matrix(device_generator)
    halves = x[: ROWS // 2], x[ROWS // 2 :]
    gram, parts = torch.zeros(2, COLUMNS, COLUMNS, device="cuda")
    norm, norms = torch.zeros(2, COLUMNS, device="cuda")
    ops.gram_(gram, x)
    ops.feature_norm_(norm, x)
    for half in halves:
        ops.gram_(parts, half)
        ops.feature_norm_(norms, half)
    torch.testing.assert_close(gram.tril(), parts.tril(), rtol=1e-4, atol=1e-4 * ROWS**0.5)
    torch.testing.assert_close(norm, norms, rtol=1e-5, atol=0)


def test_sweep(room, device_generator):
    room(60)
    weight = matrix(device_generator)
    x = torch.randn(2 * COLUMNS, COLUMNS, generator=device_generator, device="cuda")
    factor = ops.reverse_cholesky(ops.gram_(torch.zeros(COLUMNS, COLUMNS, device="cuda"), x))
    new_weight, mask, _ = ops.obs_sweep(weight, factor, "2:4")
    for rows in (slice(0, FEW), slice(ROWS - FEW, ROWS)):
        few, few_mask, _ = ops.obs_sweep(weight[rows].clone(), factor, "2:4")
        assert (mask[rows] == few_mask).float().mean() > 0.999  # sums over rows in another order may decide a near tie otherwise
        same = (mask[rows] == few_mask).all(1)
        torch.testing.assert_close(new_weight[rows][same], few[same], rtol=2e-2, atol=1e-3)
