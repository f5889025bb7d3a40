from __future__ import annotations

from sparsekern.ops import nm_q4_unpack
from sparsekern.ops.nm_q4_unpack import reference

from ..inputs import same
from ..problem import Place, Problem
from .bench_bitmask_pack import INDEXING
from .bench_nm_q4_pack import cases, packed


def unpack(place: Place, size: int, n: int, m: int) -> Problem:
    weight, scales, blocks = packed(place, size, n, m)
    arguments = {"n": n, "m": m, "out_features": size, "in_features": size}
    copies = [blocks.clone() for _ in place.copies(blocks.nbytes)]
    return Problem(
        calls=[lambda b=b: nm_q4_unpack(b, **arguments) for b in copies],
        check=same(lambda: (weight, scales)),
        baselines={INDEXING: [lambda b=b: reference(b, **arguments) for b in copies]},
        read=blocks.nbytes,
        written=weight.nbytes + scales.nbytes,
        captured=False,
    )


CASES = cases("nm_q4_unpack", unpack)


def test_nm_q4_unpack(timed, case):
    timed(case)
