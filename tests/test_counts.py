"""Counts of zeros, taken by tiles: what NumPy counts of the whole, for every kind of value and layout, and without a copy of the weight."""

import numpy as np
import pytest
import torch

from sparsekern import _counts
from sparsekern._counts import groups_over, lost_zeros, most_in_group, nonzeros, nonzeros_of_rows

WEIGHTS = {
    "a matrix": lambda: torch.randn(37, 24),
    "of 16 bits": lambda: torch.randn(37, 24).bfloat16(),
    "transposed": lambda: torch.randn(24, 37).T,
    "one row": lambda: torch.randn(1, 240),
    "no rows": lambda: torch.zeros(0, 24),
    "no columns": lambda: torch.zeros(5, 0),
}


def with_zeros(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone(memory_format=torch.preserve_format)
    weight[torch.rand(weight.shape) < 0.5] = 0.0
    weight[torch.rand(weight.shape) < 0.1] = -0.0
    weight[torch.rand(weight.shape) < 0.1] = torch.nan
    return weight


@pytest.fixture(params=[1, 100, 1 << 19])
def entries(request, monkeypatch):
    monkeypatch.setattr(_counts, "ENTRIES", request.param)


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_counts_are_those_of_the_whole(make, entries):
    before, after = with_zeros(make()), with_zeros(make())
    old, new = before.float().numpy() == 0, after.float().numpy() == 0
    assert int(nonzeros(before)) == (~old).sum()
    assert nonzeros_of_rows(before).tolist() == (~old).sum(1).tolist()
    assert lost_zeros(before, after).tolist() == [(old & ~new).sum(), old.sum()]
    groups = np.reshape(~old, (len(old), old.shape[1] // 4, 4)).sum(-1) if old.shape[1] % 4 == 0 else None
    if groups is not None:
        assert [int(groups_over(before, n, 4)) for n in range(1, 4)] == [(groups > n).sum() for n in range(1, 4)]
    if groups is not None and groups.size:
        assert int(most_in_group(before, 4)) == groups.max()


def test_no_tile_is_larger_than_said(monkeypatch):
    monkeypatch.setattr(_counts, "ENTRIES", 100)
    for shape in ((37, 24), (1, 240), (240, 1), (3, 5, 40)):
        tiles = [tile for (tile,) in _counts._tiles(torch.zeros(shape))]
        assert sum(map(torch.numel, tiles)) == torch.zeros(shape).numel()
        assert all(tile.numel() <= 100 or len(tile) == 1 for tile in tiles)


def test_the_longest_group_of_a_pattern_is_counted():
    assert int(groups_over(torch.ones(2, 128), 63, 64)) == 4 and int(most_in_group(torch.ones(2, 128), 64)) == 64
