from __future__ import annotations

from sparsekern.ops import nm_pack, nm_unpack
from sparsekern.ops.nm_unpack import reference

from ..inputs import same
from ..problem import Case, Place, Problem
from .bench_bitmask_pack import INDEXING
from .bench_nm_pack import weights


def unpack(place: Place, size: int, n: int, m: int) -> Problem:
    given = weights(place, size, n, m)
    packed = [nm_pack(weight, n, m) for weight in given]
    return Problem(
        calls=[lambda p=p: nm_unpack(**p, n=n, m=m, features=size) for p in packed],
        check=same(lambda: given[0]),
        baselines={INDEXING: [lambda p=p: reference(**p, n=n, m=m, features=size) for p in packed]},
        read=sum(tensor.nbytes for tensor in packed[0].values()),
        written=given[0].nbytes,
        captured=False,
    )


def case(n: int, m: int, cuda: dict | None = None) -> Case:
    sizes = {"size": 4096, "n": n, "m": m}
    name = f"nm_unpack {n}:{m}, 4096x4096 bfloat16"
    return Case(name, unpack, sizes, {"size": 128}, op="nm_unpack", cpu={INDEXING: 5.0}, cuda=cuda, rounds=5)


CASES = [case(2, 4, {}), case(4, 8)]


def test_nm_unpack(timed, case):
    timed(case)
