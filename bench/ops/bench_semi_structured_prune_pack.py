from __future__ import annotations

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pytorch_pack

from sparsekern.ops import semi_structured_pack, semi_structured_prune_pack

from ..inputs import n_of_m, same
from ..problem import Case, Place, Problem, Share
from .bench_semi_structured_pack import packed_bytes

THREE_OPS, PYTORCH = "nm_mask, masked_fill and semi_structured_pack", "topk, scatter and PyTorch's converter"


def pytorch(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.view(-1, 4)
    dropped = groups.abs().topk(2, dim=1, largest=False, sorted=False)[1]
    return pytorch_pack(groups.scatter(1, dropped, 0).view_as(weight))


def prune_pack(place: Place, size: int) -> Problem:
    given = [place.randn(size, size, dtype=torch.bfloat16) for _ in place.copies(2 * size**2)]
    return Problem(
        calls=[lambda w=w: semi_structured_prune_pack(w) for w in given],
        check=same(lambda: pytorch_pack(n_of_m(given[0]))),
        baselines={
            THREE_OPS: [lambda w=w: semi_structured_pack(n_of_m(w)) for w in given],
            PYTORCH: [lambda w=w: pytorch(w) for w in given],
        },
        read=given[0].nbytes,
        written=packed_bytes(given[0]),
    )


def case(size: int, **where) -> Case:
    name = f"semi_structured_prune_pack {size}x{size} bfloat16"
    return Case(name, prune_pack, {"size": size}, {"size": 128}, op="semi_structured_prune_pack", rounds=3, **where)


CASES = [
    case(4096, cpu={THREE_OPS: None, PYTORCH: None}),
    case(8192, cuda={THREE_OPS: None, PYTORCH: None}, device_goals=(Share(0.8),)),
]


def test_semi_structured_prune_pack(timed, case):
    timed(case)
