from __future__ import annotations

from collections.abc import Callable

import torch

from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.ops.nm_q4_pack import reference

from ..inputs import same
from ..problem import Case, Place, Problem
from .bench_bitmask_pack import INDEXING
from .bench_nm_q4_linear import packed_weight


def packed(place: Place, size: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, its scales and its blocks."""
    _, blocks = packed_weight(place, n, m, size, size)
    return *nm_q4_unpack(blocks, n, m, size, size), blocks


def pack(place: Place, size: int, n: int, m: int) -> Problem:
    weight, scales, blocks = packed(place, size, n, m)
    given = [weight.clone() for _ in place.copies(weight.nbytes)]
    return Problem(
        calls=[lambda w=w: nm_q4_pack(w, scales, n, m) for w in given],
        check=same(lambda: blocks),
        baselines={INDEXING: [lambda w=w: reference(w, scales, n, m) for w in given]},
        read=weight.nbytes + scales.nbytes,
        written=blocks.nbytes,
        captured=False,
    )


def cases(op: str, make: Callable[..., Problem]) -> list[Case]:
    """Return the problems of packing or unpacking, against indexing."""
    return [
        Case(
            f"{op} {n}:{m}, 4096x4096 float32",
            make,
            {"size": 4096, "n": n, "m": m},
            {"size": 128},
            op=op,
            cpu={INDEXING: 5.0},
            rounds=3,
        )
        for n, m in ((2, 4), (4, 16))
    ]


CASES = cases("nm_q4_pack", pack)


def test_nm_q4_pack(timed, case):
    timed(case)
