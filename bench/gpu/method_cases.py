"""The benchmarks of what ALPS and SparseLLM are made of: steps, splits, cross-Gram matrices, least squares."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from baselines.plain import conjugate_gradients, gradient_steps, plain_admm_step_
from sparsekern import ops

from ..problems import DAMPING, gated_objective
from .cases import Place, Problem, case
from .solve_cases import CHECKED, activations, correlated_gram, output_error


@case("admm_step_ 4096x4096 50 % of all", "admm_step_")
def admm_step_of_all(place: Place) -> Problem:
    return admm_step(place, 0.5)


@case("admm_step_ 4096x4096 2:4", "admm_step_")
def admm_step_of_groups(place: Place) -> Problem:
    return admm_step(place, "2:4")


def admm_step(place: Place, pattern: str | float) -> Problem:
    """From a fresh copy of the state, on both sides: a second step would start from zeros."""
    rows, columns = place.size(4096, 64), place.size(4096, 128)
    offset, dual, weight = (place.randn(rows, columns) for _ in range(3))
    mask = place.randn(rows, columns) > 0

    def run(step) -> list[torch.Tensor]:
        state = [offset.clone(), dual.clone(), mask.clone()]
        step(*state, weight, pattern)
        return state

    def check(state: list[torch.Tensor]) -> None:
        expected = run(plain_admm_step_)
        same = state[2] == expected[2]
        assert int((~same).sum()) <= rows, "another mask"  # `kthvalue` drops all that equal the threshold
        assert all(torch.equal(got[same], want[same]) for got, want in zip(state, expected, strict=True)), "another step"

    return Problem(
        calls=[lambda: run(ops.admm_step_)],
        check=check,
        baselines={"plain torch": [lambda: run(plain_admm_step_)]},
        bytes=26 * weight.numel(),
        captured=False,
    )


@case("cross_gram_ bf16 [65536, 4096] x [65536, 4096]", "cross_gram_")
def cross_gram(place: Place) -> Problem:
    tokens, p, q = place.size(65536, 256), place.size(4096, 64), place.size(4096, 48)
    x, y = (activations(place, tokens, features, torch.bfloat16) for features in (p, q))
    cross = place.randn(p, q).zero_()

    def add() -> torch.Tensor:
        return ops.cross_gram_(cross.zero_(), x, y)

    def public() -> None:
        cross.zero_().add_(x.float().T @ y.float())

    def check(found: torch.Tensor) -> None:
        exact = x[:, :CHECKED].double().T @ y.double()
        error = float((found[:CHECKED] - exact).norm() / exact.norm())
        assert error < 1e-5, f"off by {error:.2e}"

    flops, read = 2 * tokens * p * q, x.nbytes + y.nbytes + cross.nbytes
    return Problem([add], check, {"float().T @ float()": [public]}, flops=flops, bytes=read, unit="bf16")


@case("sensitivity_ bf16 [16384, 4096] x [4096, 4096]", "sensitivity_")
def sensitivity(place: Place) -> Problem:
    tokens, rows, features = place.size(16384, 64), place.size(4096, 48), place.size(4096, 64)
    x = activations(place, tokens, features, torch.bfloat16)
    weight, importance = place.randn(rows, features, dtype=torch.bfloat16), place.randn(rows, features).zero_()

    def add() -> torch.Tensor:
        return ops.sensitivity_(importance.zero_(), weight, x)

    def plain() -> None:
        importance.zero_().add_(weight.abs().float() * ((x @ weight.T).abs_().T @ x.abs()))

    def check(found: torch.Tensor) -> None:
        part, inputs = weight[:CHECKED].double(), x.double()
        exact = part.abs() * ((inputs @ part.T).abs().T @ inputs.abs())
        error = float((found[:CHECKED] - exact).norm() / exact.norm())
        assert error < 1e-3, f"off by {error:.2e}"  # outputs are rounded to eight bits, which over the tokens cancels out

    flops, moved = 4 * tokens * weight.numel(), x.nbytes + weight.nbytes + 2 * importance.nbytes
    return Problem([add], check, {"two products in plain torch": [plain]}, flops=flops, bytes=moved, unit="bf16")


@case("head_neuron_scores [4096, 11008] bf16, neurons", "head_neuron_scores")
def scores_of_neurons(place: Place) -> Problem:
    return unit_scores(place, place.size(4096, 64), place.size(11008, 96), 1)


@case("head_neuron_scores [4096, 4096] bf16, heads of 128", "head_neuron_scores")
def scores_of_heads(place: Place) -> Problem:
    return unit_scores(place, place.size(4096, 64), place.size(4096, 96), place.size(128, 32))


def unit_scores(place: Place, rows: int, features: int, head_size: int) -> Problem:
    squares = place.randn(features).square()
    weights = [place.randn(rows, features, dtype=torch.bfloat16) for _ in place.copies(2 * rows * features)]

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return (squares * weight.float().square().mean(0)).view(-1, head_size).mean(1)

    def check(found: torch.Tensor) -> None:
        exact = (squares * weights[0].double().square().mean(0)).view(-1, head_size).mean(1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)

    return Problem(
        calls=[partial(ops.head_neuron_scores, squares, weight, head_size) for weight in weights],
        check=check,
        baselines={"plain torch": [partial(plain, weight) for weight in weights]},
        bytes=weights[0].nbytes,
    )


@case("gated_split [8192, 11008]", "gated_split")
def gated(place: Place) -> Problem:
    shape = place.size(8192, 32), place.size(11008, 48)
    up, gate, *noise = (place.randn(*shape) for _ in range(5))
    given = F.silu(gate) * up + 0.3 * noise[0], up + 0.3 * noise[1], gate + 0.3 * noise[2], gate

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        ours, theirs = (gated_objective(*given[:3], *pair).sum() for pair in (found, gradient_steps(*given)))
        assert ours <= theirs, f"objective {float(ours):.6g}, two gradient steps reach {float(theirs):.6g}"

    return Problem(
        calls=[lambda: ops.gated_split(*given, "silu")],
        check=check,
        baselines={"two gradient steps": [lambda: gradient_steps(*given)]},
        bytes=6 * up.nbytes,
    )


@case("plain_split [8192, 16384] ReLU bf16", "plain_split")
def plain(place: Place) -> Problem:
    p, m = (place.randn(place.size(8192, 32), place.size(16384, 48), dtype=torch.bfloat16) for _ in range(2))

    def check(found: torch.Tensor) -> None:
        torch.testing.assert_close(found[:CHECKED].cpu(), ops.plain_split(*(v[:CHECKED].cpu() for v in (p, m, m)), "relu"))

    return Problem([lambda: ops.plain_split(p, m, m, "relu")], check, bytes=3 * p.nbytes)


@case("masked_lstsq 4096x4096, 50 % kept", "masked_lstsq")
def masked(place: Place) -> Problem:
    rows, columns = place.size(4096, 64), place.size(4096, 96)
    gram = correlated_gram(place, columns)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    weight, mask = place.randn(rows, columns), place.randn(rows, columns) > 0

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        ours, theirs = (output_error(weight, new, gram) for new in (found[0], conjugate_gradients(weight, gram, mask)))
        assert ours < 1.001 * theirs, f"output error {ours:.4g}, ten plain iterations leave {theirs:.4g}"
        assert not found[0][~mask].any(), "a pruned weight is not zero"

    return Problem(
        calls=[lambda: ops.masked_lstsq(weight, gram, mask, tolerance=1e-4)],
        check=check,
        baselines={"ten iterations in plain torch": [lambda: conjugate_gradients(weight, gram, mask)]},
        captured=False,
    )
