from __future__ import annotations

import torch

from sparsekern.ops import nm_pack
from sparsekern.ops.nm_pack import reference

from ..inputs import n_of_m, same
from ..problem import Case, Place, Problem
from .bench_bitmask_pack import INDEXING


def weights(place: Place, size: int, n: int, m: int) -> list[torch.Tensor]:
    return [n_of_m(place.randn(size, size, dtype=torch.bfloat16), f"{n}:{m}") for _ in place.copies(2 * size**2)]


def pack(place: Place, size: int, n: int, m: int) -> Problem:
    given = weights(place, size, n, m)
    return Problem(
        calls=[lambda w=w: tuple(nm_pack(w, n, m).values()) for w in given],
        check=same(lambda: reference(given[0], n, m)),
        baselines={INDEXING: [lambda w=w: reference(w, n, m) for w in given]},
        read=given[0].nbytes,
        written=sum(tensor.nbytes for tensor in reference(given[0], n, m)),
        captured=False,
    )


def case(n: int, m: int) -> Case:
    sizes = {"size": 4096, "n": n, "m": m}
    name = f"nm_pack {n}:{m}, 4096x4096 bfloat16"
    return Case(name, pack, sizes, {"size": 128}, op="nm_pack", cpu={INDEXING: 5.0}, rounds=5)


CASES = [case(2, 4), case(4, 8)]


def test_nm_pack(timed, case):
    timed(case)
