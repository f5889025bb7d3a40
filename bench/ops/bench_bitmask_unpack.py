from __future__ import annotations

import torch

from sparsekern.ops import bitmask_pack, bitmask_unpack
from sparsekern.ops.bitmask_unpack import reference

from ..inputs import same, short
from ..problem import Case, Place, Problem
from .bench_bitmask_pack import INDEXING, weights


def unpack(place: Place, size: int, zeros: float, dtype: torch.dtype) -> Problem:
    given = weights(place, size, zeros, dtype)
    packed = [bitmask_pack(weight) for weight in given]
    return Problem(
        calls=[lambda p=p: bitmask_unpack(**p, features=size) for p in packed],
        check=same(lambda: given[0]),
        baselines={INDEXING: [lambda p=p: reference(**p, features=size) for p in packed]},
        read=sum(tensor.nbytes for tensor in packed[0].values()),
        written=given[0].nbytes,
        captured=False,
    )


def case(dtype: torch.dtype, cuda: dict | None = None) -> Case:
    sizes = {"size": 4096, "zeros": 0.5, "dtype": dtype}
    name = f"bitmask_unpack 50% zeros, 4096x4096 {short(dtype)}"
    return Case(name, unpack, sizes, {"size": 128}, op="bitmask_unpack", cpu={INDEXING: 5.0}, cuda=cuda, rounds=5)


CASES = [case(torch.bfloat16, {}), case(torch.float32)]


def test_bitmask_unpack(timed, case):
    timed(case)
