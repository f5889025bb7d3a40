from __future__ import annotations

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pytorch_pack

from sparsekern.ops import semi_structured_pack

from ..inputs import n_of_m, same
from ..problem import Case, Place, Problem

CONVERTER = "PyTorch's converter"


def pruned_weights(place: Place, size: int) -> list[torch.Tensor]:
    return [n_of_m(place.randn(size, size, dtype=torch.bfloat16)) for _ in place.copies(2 * size**2)]


def packed_bytes(weight: torch.Tensor) -> int:
    """Bytes of the values and of the metadata."""
    return weight.nbytes // 2 + weight.numel() // 8


def pack(place: Place, size: int) -> Problem:
    given = pruned_weights(place, size)
    return Problem(
        calls=[lambda w=w: semi_structured_pack(w) for w in given],
        check=same(lambda: pytorch_pack(given[0])),
        baselines={CONVERTER: [lambda w=w: pytorch_pack(w) for w in given]},
        read=given[0].nbytes,
        written=packed_bytes(given[0]),
    )


def case(size: int, **where) -> Case:
    name = f"semi_structured_pack {size}x{size} bfloat16"
    return Case(name, pack, {"size": size}, {"size": 128}, op="semi_structured_pack", rounds=3, **where)


CASES = [case(4096, cpu={CONVERTER: None}), case(8192, cuda={CONVERTER: None})]


def test_semi_structured_pack(timed, case):
    timed(case)
