"""The experts of one block: many matrices of one size, each with a Gram matrix of its own, solved in one call or one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from sparsekern import SparseGPT
from sparsekern.methods.statistics import Gram
from sparsekern.ops import obs_sweep, reverse_cholesky
from sparsekern.pattern import parse_pattern

from ..inputs import DAMPING, gram_of
from ..problem import Case, Place, Problem
from .bench_obs_sweep import assert_as_good, assert_exact, prune, textbook

LOOP, TEXTBOOK = "a Python loop over the experts", "textbook"
DIFFERENT = 4  # Gram matrices that are made; the experts have scaled copies of them
Solved = tuple[torch.Tensor, ...]  # weights, and masks where the op returns them


def grams_of(place: Place, experts: int, columns: int) -> torch.Tensor:
    made = [gram_of(place, columns) for _ in range(min(experts, DIFFERENT))]
    grams = torch.empty(experts, columns, columns, device=place.device)
    for index in range(experts):
        torch.mul(made[index % DIFFERENT], 1 + index / experts, out=grams[index])
    return grams


def check_of(alone: Callable[[int], Solved], place: Place) -> Callable[[Solved], None]:
    """Return a check that some results are those of `alone(index)`: to the bit on a CPU, and nearly so on a GPU."""

    def check(results: Solved) -> None:
        for index in {0, len(results[0]) - 1}:
            for found, expected in zip(results, alone(index), strict=True):
                same = torch.equal if place.device.type == "cpu" else torch.allclose
                assert same(found[index], expected), f"expert {index}: not the result of a call of its own"

    return check


def ops(place: Place, experts: int, rows: int, columns: int, pattern: str | float) -> Problem:
    """`reverse_cholesky` and `obs_sweep` in float32."""
    small, small_gram = place.randn(96, 256), gram_of(place, 256)
    weights, grams = place.randn(experts, rows, columns), grams_of(place, experts, columns)
    same = check_of(lambda index: prune(weights[index], grams[index], pattern), place)

    def check(results: Solved) -> None:
        same(results)
        assert_exact(small, small_gram, pattern)
        first = results[0][0], results[1][0]
        assert_as_good(weights[0], grams[0], first, textbook(weights[0], grams[0], pattern))

    def each(solve: Callable[..., Solved]) -> Callable[[], list[Solved]]:
        return lambda: [solve(weight, gram, pattern) for weight, gram in zip(weights, grams, strict=True)]

    return Problem(
        calls=[lambda: obs_sweep(weights, reverse_cholesky(grams, DAMPING), pattern)[:2]],
        check=check,
        baselines={LOOP: [each(prune)], TEXTBOOK: [each(textbook)]},
        flops=experts * (columns**3 // 3 + rows * columns**2),
        read=weights.nbytes + grams.nbytes // 2,
        written=weights.nbytes + weights.numel(),
        captured=False,
    )


def method(place: Place, experts: int, rows: int, columns: int, pattern: str | float) -> Problem:
    """`SparseGPT` in bfloat16, with the error of each row. Gate and up share their Gram matrices: two weights an expert."""
    weights = [place.randn(experts, rows, columns, dtype=torch.bfloat16) for _ in range(2)]
    grams, parsed, calls = grams_of(place, experts, columns), parse_pattern(pattern), itertools.count()
    statistics = [Gram(columns, place.device) for _ in range(experts)]
    for own, gram in zip(statistics, grams, strict=True):
        own.include(gram)

    def fresh() -> SparseGPT:
        """Return the method with a damping that no factor is kept for, though it is the same in float32."""
        return SparseGPT(damping=DAMPING + next(calls) * 1e-17)

    def one_by_one() -> None:
        solver = fresh()
        for index, own in enumerate(statistics):
            for weight in weights:
                solver.solve(weight[index], own, parsed)

    def together() -> Solved:
        solver = fresh()
        gates, _ = (solver.solve_many(weight, statistics, parsed) for weight in weights)
        return (torch.stack([solution.weight for solution in gates]),)

    def alone(index: int) -> Solved:
        return (fresh().solve(weights[0][index], statistics[index], parsed).weight,)

    return Problem(
        calls=[together],
        check=check_of(alone, place),
        baselines={LOOP: [one_by_one]},
        flops=experts * (columns**3 // 3 + 4 * rows * columns**2),  # the errors of rounded weights cost as much as the sweep
        read=4 * weights[0].numel() + grams.nbytes // 2,
        written=4 * weights[0].numel(),
        captured=False,
    )


def case(make: Callable[..., Problem], name: str, experts: int, rows: int, columns: int, pattern: str | float, **where) -> Case:
    sizes = {"experts": experts, "rows": rows, "columns": columns, "pattern": pattern}
    toy = {"experts": 3, "rows": 96, "columns": 256}
    return Case(f"{experts} experts of {rows}x{columns} {pattern}, {name}", make, sizes, toy, rounds=3, **where)


OPS = "factor and sweep"
CASES = [
    *(
        case(ops, OPS, 64, 768, 2048, pattern, cpu={LOOP: 3.0}, cuda=cuda, likely_seconds=20)
        for pattern, cuda in (("2:4", {LOOP: None}), (0.5, None))
    ),
    *(case(ops, OPS, 8, 768, 2048, pattern, cpu={TEXTBOOK: 3.0}) for pattern in ("2:4", 0.5)),
    *(
        case(ops, OPS, 64, rows, columns, pattern, cpu={LOOP: None, TEXTBOOK: None})
        for rows, columns in ((256, 512), (64, 128))
        for pattern in ("2:4", 0.5)
    ),
    case(method, "gate and up by SparseGPT in bfloat16", 16, 768, 2048, "2:4", cpu={LOOP: None}),
    case(method, "gate and up by SparseGPT in bfloat16", 64, 64, 128, "2:4", cpu={LOOP: None}),
]  # fmt: skip


def test_experts(timed, case):
    timed(case)
