from __future__ import annotations

from sparsekern.runtime.formats import NMPacked

from ..inputs import n_of_m
from ..problem import Case
from .bench_bitmask_linear import DENSE, HAND_WRITTEN, SHAPES, TOY, product


def case(pattern: str, tokens: int, shape: tuple[int, int], cpu, cuda=None) -> Case:
    n, m = map(int, pattern.split(":"))
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"nm_linear {pattern}, {some}, {shape[0]}x{shape[1]} bfloat16",
        product,
        {
            "fmt": NMPacked(n, m),
            "prune": lambda place, weight: n_of_m(weight, pattern),
            "rows": shape[0],
            "columns": shape[1],
            "tokens": tokens,
        },
        TOY | {"tokens": min(tokens, 40)},
        op="nm_linear",
        cpu=cpu,
        cuda=cuda,
        rounds=41 if tokens == 1 else 5,
    )


CASES = [
    *(case("2:4", 1, shape, {DENSE: 2.4, HAND_WRITTEN: None}, {DENSE: 1.0}) for shape in SHAPES),
    *(case(pattern, 1, SHAPES[0], {DENSE: None}) for pattern in ("1:4", "4:8")),
    *(case("2:4", tokens, SHAPES[0], {DENSE: 0.9}, {DENSE: None} if tokens in (16, 512) else None) for tokens in (4, 16, 64, 512)),
]


def test_nm_linear(timed, case):
    timed(case)
