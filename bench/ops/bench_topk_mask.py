from __future__ import annotations

import torch

from sparsekern.ops import topk_mask
from sparsekern.ops.topk_mask import reference as topk_by_sort

from ..inputs import same, short
from ..problem import Case, Place, Problem

SORT, TOPK, KTHVALUE = "full stable sort", "topk and scatter", "kthvalue and compare"


def sort_and_scatter(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the mask by the full stable sort of the public Wanda, which marks what is pruned."""
    order = torch.sort(scores, dim=-1, stable=True)[1]
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    return ~pruned.scatter_(1, order[:, : scores.shape[1] - k], True)


def topk_and_scatter(scores: torch.Tensor, k: int) -> torch.Tensor:
    order = torch.topk(scores, k, dim=-1, sorted=False)[1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def kthvalue_and_compare(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the mask by a threshold, exact only where scores are distinct."""
    return scores > torch.kthvalue(scores, scores.shape[1] - k, dim=-1, keepdim=True)[0]


def mask(place: Place, rows: int, columns: int, scope: str, dtype: torch.dtype) -> Problem:
    """Half of Wanda's scores of random weights."""
    scale = place.rand(columns)
    given = [(place.randn(rows, columns).abs() * scale).to(dtype) for _ in place.copies(rows * columns * dtype.itemsize)]
    k = (rows if scope == "matrix" else 1) * columns // 2

    def by(method) -> list:
        """The matrix is one row where the scope is the matrix."""
        return [lambda s=s: method(s.view(1, -1) if scope == "matrix" else s, k).view(rows, columns) for s in given]

    return Problem(
        calls=[lambda s=s: topk_mask(s, k, scope=scope) for s in given],
        check=same(lambda: topk_by_sort(given[0], k, scope=scope)),
        baselines={SORT: by(sort_and_scatter), TOPK: by(topk_and_scatter), KTHVALUE: by(kthvalue_and_compare)},
        read=given[0].nbytes,
        written=given[0].numel(),
    )


def case(columns: int, scope: str, dtype: torch.dtype, **where) -> Case:
    sizes = {"rows": 4096, "columns": columns, "scope": scope, "dtype": dtype}
    name = f"topk_mask {scope} 4096x{columns} {short(dtype)} 50 %"
    return Case(name, mask, sizes, {"rows": 64, "columns": 320}, op="topk_mask", rounds=3, **where)


CASES = [
    case(4096, "row", torch.float32, cpu={SORT: 10.0, TOPK: None, KTHVALUE: None}),
    case(4096, "row", torch.bfloat16, cpu={SORT: None}),
    case(4096, "row", torch.float16, cpu={SORT: None}),
    case(4096, "matrix", torch.float32, cpu={SORT: None}),
    case(11008, "row", torch.float32, cuda={SORT: None}),
    case(11008, "matrix", torch.float32, cuda={SORT: None}),
]


def test_topk_mask(timed, case):
    timed(case)
