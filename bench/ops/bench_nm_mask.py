from __future__ import annotations

import torch

from sparsekern.ops import nm_mask
from sparsekern.ops.topk_mask import reference as topk_by_sort

from ..inputs import short
from ..problem import Case, Place, Problem

LOOP, GROUPED = "the public Wanda's loop over groups", "topk and scatter"


def column_loop(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return the mask by the loop of the public Wanda, which marks what is pruned."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], m):
        smallest = torch.topk(scores[:, first : first + m], m - n, dim=1, largest=False)[1]
        pruned.scatter_(1, first + smallest, True)
    return ~pruned


def grouped_topk(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = scores.view(-1, m)
    best = torch.topk(groups, n, dim=1, sorted=False)[1]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view_as(scores)


def mask(place: Place, size: int, n: int, m: int, dtype: torch.dtype) -> Problem:
    distinct = dtype == torch.float32  # no two scores of a group are equal, so that every way finds the same mask

    def scores() -> torch.Tensor:
        if distinct:
            return place.rand(size, size) + torch.arange(size, device=place.device) % m
        return place.randn(size, size, dtype=dtype)

    given = [scores() for _ in place.copies(size * size * dtype.itemsize)]

    def check(found: torch.Tensor) -> None:
        assert torch.equal(found, topk_by_sort(given[0].view(-1, m), n).view(size, size)), "not the mask of the largest"
        assert not distinct or torch.equal(found, column_loop(given[0], n, m)), "not the mask of the public loop"

    return Problem(
        calls=[lambda s=s: nm_mask(s, f"{n}:{m}") for s in given],
        check=check,
        baselines={
            LOOP: [lambda s=s: column_loop(s, n, m) for s in given],
            GROUPED: [lambda s=s: grouped_topk(s, n, m) for s in given],
        },
        read=given[0].nbytes,
        written=given[0].numel(),
    )


def case(size: int, n: int, m: int, dtype: torch.dtype, **where) -> Case:
    sizes = {"size": size, "n": n, "m": m, "dtype": dtype}
    return Case(f"nm_mask {n}:{m} {size}x{size} {short(dtype)}", mask, sizes, {"size": 128}, op="nm_mask", rounds=3, **where)


CASES = [
    *(case(4096, n, m, torch.float32, cpu={LOOP: None, GROUPED: None}) for n, m in ((2, 4), (4, 8), (16, 32))),
    case(8192, 2, 4, torch.bfloat16, cuda={GROUPED: None}),
]


def test_nm_mask(timed, case):
    timed(case)
