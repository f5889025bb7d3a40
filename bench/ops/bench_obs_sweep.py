from __future__ import annotations

import torch

from baselines.textbook import textbook_sparsegpt, textbook_sweep
from sparsekern.ops import obs_sweep, reverse_cholesky
from sparsekern.ops.topk_mask import reference as topk_by_sort

from ..inputs import CHECKED, DAMPING, gram_of, output_error
from ..problem import Case, Place, Problem, Turns, Within

TEXTBOOK, LOOP = "textbook", "textbook loop"
ARGUMENTS = {"2:4": {"n_zeros": 2, "m": 4}, 0.5: {"sparsity": 0.5}}
NO_WORSE = 1.002  # times the textbook's error
Pruned = tuple[torch.Tensor, torch.Tensor]  # weight and mask


def prune(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> Pruned:
    return obs_sweep(weight, reverse_cholesky(gram, DAMPING), pattern)[:2]


def textbook(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> Pruned:
    return textbook_sparsegpt(weight, gram, percdamp=DAMPING, **ARGUMENTS[pattern])


def assert_as_good(weight: torch.Tensor, gram: torch.Tensor, ours: Pruned, theirs: Pruned) -> None:
    """Raise unless the masks agree except for near ties, and ours costs no more."""
    (new_weight, mask), (their_weight, their_mask) = ours, theirs
    agreement = float((mask == their_mask).float().mean())
    assert agreement > 0.999, f"only {agreement:.4%} of the mask is the textbook's"
    error, their_error = output_error(weight, new_weight, gram), output_error(weight, their_weight, gram)
    assert error < NO_WORSE * their_error, f"output error {error:.4g}, the textbook's is {their_error:.4g}"
    assert not new_weight[~mask].any(), "a pruned weight is not zero"


def assert_exact(weight: torch.Tensor, gram: torch.Tensor, pattern: str | float) -> None:
    """Raise unless ours is the textbook in float64, which for a sparsity prunes one weight more in each block of 128 columns."""
    new_weight, mask = prune(weight, gram, pattern)
    expected, expected_mask = textbook(weight.double(), gram.double(), pattern)
    agree = mask == expected_mask
    assert int((~agree).sum()) <= (0 if pattern == "2:4" else 16), "another mask than the textbook's in float64"
    rows = agree.all(1)
    assert torch.allclose(new_weight[rows].double(), expected[rows], rtol=1e-3, atol=1e-4), "other weights than the textbook's"


def layer(place: Place, rows: int, columns: int, pattern: str | float, weights: int = 1) -> Problem:
    """Layers that share a Gram matrix, by `reverse_cholesky` and `obs_sweep`; the textbook factors it three times for each layer."""
    small, small_gram = place.randn(96, 256), gram_of(place, 256)
    gram = gram_of(place, columns)
    given = [place.randn(rows, columns) for _ in range(weights)]

    def ours() -> list[Pruned]:
        factor = reverse_cholesky(gram, DAMPING)
        return [obs_sweep(weight, factor, pattern)[:2] for weight in given]

    def check(results: list[Pruned]) -> None:
        assert_exact(small, small_gram, pattern)
        assert_as_good(given[0], gram, results[0], textbook(given[0], gram, pattern))

    return Problem(
        calls=[ours],
        check=check,
        baselines={TEXTBOOK: [lambda: [textbook(weight, gram, pattern) for weight in given]]},
        flops=columns**3 // 3 + weights * rows * columns**2,
        read=weights * given[0].nbytes + gram.nbytes // 2,
        written=weights * (given[0].nbytes + given[0].numel()),
        captured=False,
    )


def sweep(place: Place, rows: int, columns: int, pattern: str | float, scope: str = "block") -> Problem:
    """`obs_sweep` alone."""
    small, small_gram = place.randn(96, 256), gram_of(place, 256)
    gram = gram_of(place, columns)
    factor = reverse_cholesky(gram, DAMPING)
    weight = place.randn(rows, columns)
    # `V^-1` is the upper factor of the inverse Hessian, so both loops start from the same numbers.
    upper = torch.linalg.solve_triangular(factor, torch.eye(columns, device=place.device), upper=True)
    loop = Turns([lambda: textbook_sweep(weight, upper, **ARGUMENTS[pattern])])

    def check(result: tuple[torch.Tensor, ...]) -> None:
        new_weight, mask, _ = result
        assert int(mask.sum()) == mask.numel() // 2, "not half of the weights are kept"
        if scope == "block":
            assert_exact(small, small_gram, pattern)
            assert_as_good(weight, gram, (new_weight, mask), loop.result or loop())
        elif scope == "matrix":  # chosen from the starting weights
            score = weight.abs() * factor.diagonal()
            assert torch.equal(mask, topk_by_sort(score, mask.numel() // 2, scope="matrix")), "not the mask of the best weights"
        else:  # rows do not depend on each other
            few = slice(0, CHECKED)
            expected = obs_sweep(weight[few].cpu(), factor.cpu(), pattern, scope=scope)[1]
            agreement = float((mask[few].cpu() == expected).float().mean())
            assert agreement > 0.999, f"only {agreement:.4%} of the mask is that of the CPU kernel"

    return Problem(
        calls=[lambda: obs_sweep(weight, factor, pattern, scope=scope)],
        check=check,
        baselines={LOOP: [loop]},
        flops=rows * columns**2,
        read=weight.nbytes + factor.nbytes // 2,
        written=weight.nbytes + weight.numel(),
    )


def case(kind, rows: int, columns: int, pattern: str | float, name: str, toy=None, **more) -> Case:
    sizes = {"rows": rows, "columns": columns, "pattern": pattern} | more.pop("sizes", {})
    rounds = 3 if columns > 2000 else 7
    return Case(name, kind, sizes, toy or {"rows": 256, "columns": 256}, rounds=rounds, **more)


def alone(rows: int, columns: int, pattern: str | float, **more) -> Case:
    return case(sweep, rows, columns, pattern, f"obs_sweep {rows}x{columns} {pattern}", op="obs_sweep", **more)


ON_DEVICE = {"device_goals": (Within(3e-3),), "cuda": {LOOP: 100}, "likely_seconds": 8}
SMALL = ((576, 576), (1536, 576), (576, 1536))
GOALS = {(4096, 4096, 0.5): 5.0, (4096, 4096, "2:4"): 3.5} | {(*shape, pattern): 6.0 for shape in SMALL for pattern in ARGUMENTS}

CASES = [
    *(alone(4096, 4096, pattern, cpu={LOOP: None}, **ON_DEVICE) for pattern in ARGUMENTS),
    case(
        layer, 4096, 4096, "2:4", "q, k and v of 4096x4096 to 2:4 from one Gram matrix",
        sizes={"weights": 3}, cuda={TEXTBOOK: 40}, likely_seconds=15,
    ),
    alone(11008, 4096, "2:4", cuda={}),
    alone(4096, 11008, "2:4", toy={"rows": 256, "columns": 320}, cuda={}),
    *(
        case(sweep, 4096, 4096, 0.5, f"obs_sweep 4096x4096 0.5, scope {scope}", op="obs_sweep", sizes={"scope": scope}, cuda={})
        for scope in ("row", "matrix")
    ),
    *(alone(rows, columns, pattern, cpu={LOOP: None}) for rows, columns in SMALL for pattern in ARGUMENTS),
    *(
        case(layer, rows, columns, pattern, f"reverse_cholesky + obs_sweep {rows}x{columns} {pattern}", cpu={TEXTBOOK: goal})
        for (rows, columns, pattern), goal in GOALS.items()
    ),
]  # fmt: skip


def test_obs_sweep(timed, case):
    timed(case)
