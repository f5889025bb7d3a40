from __future__ import annotations

import torch

from sparsekern.runtime.formats import NMPacked

from ..inputs import n_of_m, short
from ..problem import Case
from .bench_bitmask_linear import DENSE, HAND_WRITTEN, SHAPES, TOY, by_isa, product


def case(pattern: str, tokens: int, shape: tuple[int, int], cpu, cuda=None, dtype: torch.dtype = torch.bfloat16) -> Case:
    n, m = map(int, pattern.split(":"))
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"nm_linear {pattern}, {some}, {shape[0]}x{shape[1]} {short(dtype)}",
        product,
        {
            "fmt": NMPacked(n, m),
            "prune": lambda place, weight: n_of_m(weight, pattern),
            "rows": shape[0],
            "columns": shape[1],
            "tokens": tokens,
            "dtype": dtype,
        },
        TOY | {"tokens": min(tokens, 40)},
        op="nm_linear",
        cpu=cpu,
        cuda=cuda,
        rounds=41 if tokens == 1 else 5,
    )


FEW_TOKENS = {4: 1.5, 16: 1.0}  # goals with AVX2

CASES = [
    *(case("2:4", 1, shape, {DENSE: by_isa(2.4, avx2=2.2), HAND_WRITTEN: None}, {DENSE: 1.0}) for shape in SHAPES),
    *(case(pattern, 1, SHAPES[0], {DENSE: by_isa(None, avx2=goal)}) for pattern, goal in (("1:4", 3.0), ("4:8", 1.8))),
    case("2:4", 1, SHAPES[0], {DENSE: by_isa(None, avx2=1.8)}, dtype=torch.float32),
    *(
        case(
            "2:4",
            tokens,
            SHAPES[0],
            {DENSE: by_isa(0.9, avx2=FEW_TOKENS.get(tokens, 0.9))},
            {DENSE: None} if tokens in (16, 512) else None,
        )
        for tokens in (4, 16, 64, 512)
    ),
    *(case("2:4", tokens, SHAPES[0], {DENSE: by_isa(None, avx2=goal)}, dtype=torch.float32) for tokens, goal in FEW_TOKENS.items()),
]


def test_nm_linear(timed, case):
    timed(case)
