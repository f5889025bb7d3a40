from __future__ import annotations

import pytest
import torch

from sparsekern.ops import topk_mask

ROWS, COLUMNS = 4096, 4096
KEPT = COLUMNS // 2


def sort_and_scatter(scores: torch.Tensor) -> torch.Tensor:
    """The full stable sort of the public Wanda, row by row; it marks what is pruned."""
    order = torch.sort(scores, dim=-1, stable=True)[1]
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    return ~pruned.scatter_(1, order[:, : COLUMNS - KEPT], True)


def topk_and_scatter(scores: torch.Tensor) -> torch.Tensor:
    order = torch.topk(scores, KEPT, dim=-1, sorted=False)[1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def kthvalue_and_compare(scores: torch.Tensor) -> torch.Tensor:
    """Exact only where scores are distinct."""
    return scores > torch.kthvalue(scores, COLUMNS - KEPT, dim=-1, keepdim=True)[0]


def sort_matrix(scores: torch.Tensor) -> torch.Tensor:
    """The threshold of the public magnitude pruning, made exact."""
    order = torch.sort(scores.flatten(), stable=True, descending=True)[1]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: scores.numel() // 2]] = True
    return mask.view_as(scores)


ROW = {
    "sparsekern": lambda scores: topk_mask(scores, KEPT),
    "sort": sort_and_scatter,
    "topk": topk_and_scatter,
    "kthvalue": kthvalue_and_compare,
}
MATRIX = {"sparsekern": lambda scores: topk_mask(scores, scores.numel() // 2, scope="matrix"), "sort": sort_matrix}


def distinct_scores(generator: torch.Generator) -> torch.Tensor:
    """Wanda's scores of random weights, in an order that leaves no ties for the baselines to break in their own way."""
    scores = torch.randn(ROWS, COLUMNS, generator=generator).abs() * torch.rand(COLUMNS, generator=generator)
    spread = torch.argsort(torch.argsort(scores, dim=-1), dim=-1)
    return (spread + 1) * 1e-6 + scores


@pytest.mark.parametrize("name", ROW)
def test_row_scope(measure, generator, name):
    scores = distinct_scores(generator)
    assert torch.equal(ROW[name](scores), sort_and_scatter(scores))
    compared = (
        {"against": lambda: sort_and_scatter(scores), "baseline": "full stable sort", "goal": 10.0} if name == "sparsekern" else {}
    )
    measure(lambda: ROW[name](scores), group="topk_mask row 4096x4096 float32 50 %", bytes=scores.nbytes, rounds=3, **compared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sparsekern", "sort"])
def test_row_scope_half(measure, generator, dtype, name):
    scores = torch.randn(ROWS, COLUMNS, generator=generator).abs().to(dtype)
    kept = topk_mask(scores, KEPT)
    assert kept.sum(1).eq(KEPT).all()
    assert (scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(kept, -torch.inf).amax(1)).all()
    group = f"topk_mask row 4096x4096 {str(dtype).removeprefix('torch.')} 50 %"
    measure(lambda: ROW[name](scores), group=group, bytes=scores.nbytes, rounds=3)


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_scope(measure, generator, name):
    scores = torch.randn(ROWS, COLUMNS, generator=generator).abs()
    assert torch.equal(MATRIX[name](scores), sort_matrix(scores))
    measure(lambda: MATRIX[name](scores), group="topk_mask matrix 4096x4096 float32 50 %", bytes=scores.nbytes, rounds=2)
