from __future__ import annotations

import torch

from sparsekern.ops import bitmask_pack
from sparsekern.ops.bitmask_pack import reference

from ..inputs import same, short
from ..problem import Case, Place, Problem
from .bench_bitmask_linear import random_zeros

INDEXING = "torch indexing"


def weights(place: Place, size: int, zeros: float, dtype: torch.dtype) -> list[torch.Tensor]:
    prune = random_zeros(zeros)
    return [prune(place, place.randn(size, size)).to(dtype) for _ in place.copies(dtype.itemsize * size**2)]


def pack(place: Place, size: int, zeros: float, dtype: torch.dtype) -> Problem:
    given = weights(place, size, zeros, dtype)
    return Problem(
        calls=[lambda w=w: tuple(bitmask_pack(w).values()) for w in given],
        check=same(lambda: reference(given[0])),
        baselines={INDEXING: [lambda w=w: reference(w) for w in given]},
        read=2 * given[0].nbytes,  # the number of values is known only after the first reading
        written=sum(tensor.nbytes for tensor in reference(given[0])),
        captured=False,
    )


def case(zeros: float, dtype: torch.dtype) -> Case:
    sizes = {"size": 4096, "zeros": zeros, "dtype": dtype}
    name = f"bitmask_pack {zeros:.0%} zeros, 4096x4096 {short(dtype)}"
    return Case(name, pack, sizes, {"size": 128}, op="bitmask_pack", cpu={INDEXING: 5.0}, rounds=5)


CASES = [case(0.5, torch.bfloat16), case(0.7, torch.bfloat16), case(0.5, torch.float32)]


def test_bitmask_pack(timed, case):
    timed(case)
