from __future__ import annotations

import pytest
import torch

from sparsekern.ops import nm_mask

ROWS, COLUMNS = 4096, 4096


def column_loop(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The loop over groups of the public Wanda; it marks what is pruned."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], m):
        smallest = torch.topk(scores[:, first : first + m], m - n, dim=1, largest=False)[1]
        pruned.scatter_(1, first + smallest, True)
    return ~pruned


def grouped_topk(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = scores.view(-1, m)
    best = torch.topk(groups, n, dim=1, sorted=False)[1]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view_as(scores)


IMPLEMENTATIONS = {"sparsekern": lambda s, n, m: nm_mask(s, f"{n}:{m}"), "column loop": column_loop, "grouped topk": grouped_topk}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (16, 32)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nm_mask(measure, generator, name, n, m):
    scores = torch.rand(ROWS, COLUMNS, generator=generator) + torch.arange(COLUMNS) % m  # no two of a group are equal
    implementation = IMPLEMENTATIONS[name]
    assert torch.equal(implementation(scores, n, m), column_loop(scores, n, m))
    measure(lambda: implementation(scores, n, m), group=f"nm_mask {n}:{m} 4096x4096 float32", bytes=scores.nbytes, rounds=3)
