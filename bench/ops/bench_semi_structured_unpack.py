from __future__ import annotations

from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as pytorch_unpack

from sparsekern.ops import semi_structured_pack, semi_structured_unpack

from ..inputs import same
from ..problem import Case, Place, Problem
from .bench_semi_structured_pack import CONVERTER, packed_bytes, pruned_weights


def unpack(place: Place, size: int) -> Problem:
    given = pruned_weights(place, size)
    packed = [semi_structured_pack(weight) for weight in given]
    return Problem(
        calls=[lambda p=p: semi_structured_unpack(*p) for p in packed],
        check=same(lambda: given[0]),
        baselines={CONVERTER: [lambda p=p: pytorch_unpack(*p) for p in packed]},
        read=packed_bytes(given[0]),
        written=given[0].nbytes,
    )


def case(size: int, **where) -> Case:
    name = f"semi_structured_unpack {size}x{size} bfloat16"
    return Case(name, unpack, {"size": size}, {"size": 128}, op="semi_structured_unpack", rounds=3, **where)


CASES = [case(4096, cpu={CONVERTER: None}), case(8192, cuda={CONVERTER: None})]


def test_semi_structured_unpack(timed, case):
    timed(case)
