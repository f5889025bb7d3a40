"""SparseLLM (AdaGP): prune the linears of a feed-forward network together, to match the output of the dense network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from .. import ops
from .._activations import activate
from ..backends.products import full_float32
from ..pattern import Pattern
from ._fields import choice, flag, method, number, whole
from .base import BlockMethod, LinearMethod, PlannedBlock
from .network import FeedForwardProblem, FeedForwardSolution, Layer
from .solution import Solution, Work
from .statistics import Gram, HasGram, Importance


@dataclass(frozen=True)
class SparseLLM(BlockMethod):
    """Prune the up (gate) and down projections of each block in alternation with auxiliary activations, other linears by `solver`.

    With the inputs `x` and outputs `y` of the dense network, the alternation minimises over the weights, and for every token over
    `z`, `s` and `p`:

    `beta |p W_down^T + b - y|^2 + gamma |p - act(s) z|^2 + alpha |z - x W_up^T - b|^2 + alpha |s - x W_gate^T - b|^2`

    Without a gate there is no `s`, and the second term is `gamma |p - act(z)|^2`. A round prunes the weights by `solver`, updates
    `p`, then `z` and `s`, and fits dense weights to them. The next round prunes these with a new mask. The first round is `solver`
    by itself.

    All minimisers are exact except `s`, which has no closed form. `z` and `s` are found together by safeguarded Gauss-Newton
    steps in every entry (`ops.gated_split`). The public program takes two gradient steps of fixed length, which depend on the
    scale of the activations. `p` is found in the space of the outputs (Woodbury), the weights by normal equations with the factor
    that pruning uses. The damping pulls the fit towards the previous weights, not towards zero. So no update raises the
    objective, and dense weights keep their values if nothing is pruned. Only the ratios of alpha, beta and gamma matter.

    Example:
        >>> method = sparsekern.SparseLLM(solver="wanda", iterations=2)
        >>> report = sparsekern.prune(model, method, "2:4", calibration=ids, progress=False)
        >>> report.sparsity
        0.5

    Source: Bai et al., SparseLLM (first AdaGP), NeurIPS 2024, arXiv 2402.17946: the alternating minimisation of its OPT and LLaMA
    forms, with the constants of its program.
    """

    name: ClassVar[str] = "sparsellm"
    needs: ClassVar = Gram

    solver: str | LinearMethod = method(
        "sparsegpt",
        expected="the name or config of a method that solves one linear from the Gram matrix of its inputs",
        help="method that prunes each linear inside (paper: 'sparsegpt'), such as 'wanda', 'magnitude' or ALPS()",
    )
    alpha: float = number(5.0, above=0, help="weight of the auxiliary outputs' terms (paper: 0.1 for OPT, 5 for LLaMA)")
    beta: float = number(5.0, above=0, help="weight of the network's output (paper: as alpha)")
    gamma: float = number(5.0, above=0, help="weight of the activation's term (paper: as alpha)")
    iterations: int = whole(4, at_least=1, help="rounds of the alternation (paper: 4)")
    attention: str = choice(
        "dense",
        ("dense", "pruned"),
        help="attention in front of the network when its inputs and outputs are taken: dense (paper), or pruned as in the result",
    )
    newton_steps: int = whole(4, at_least=1, help="Gauss-Newton steps in an update of s, or of z without gate and ReLU")
    damping: float = number(0.01, above=0, help="share of the Gram matrix's mean diagonal that damps the fit of dense weights")
    keep: str = choice(
        "best", ("best", "last"), help="round whose weights are kept: the one with the least output error, or the last (paper)"
    )
    keep_zeros: bool = flag(
        True,
        help="leave zeros of the weights zero, as the first that are pruned, where the solver does so too; False fits them too",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.local  # refuses a solver that cannot be used

    @property
    def local(self) -> LinearMethod:
        """The config of `solver`."""
        from . import resolve_method

        try:
            local = resolve_method(self.solver)
        except (ValueError, TypeError) as error:
            raise type(error)(f"SparseLLM.solver: {error}") from error
        if not isinstance(local, LinearMethod) or isinstance(local, BlockMethod) or _sees_tokens(local):
            raise ValueError(
                f"SparseLLM.solver: expected a method that solves one linear from the Gram matrix of its inputs, got {self.solver!r}"
            )
        return local

    def settings(self) -> dict[str, object]:
        return {"name": self.name, **asdict(self), "solver": self.local.settings()}

    @property
    def needs_whole_model(self) -> bool:
        return self.local.needs_whole_model

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        return self.local.allocate(blocks, patterns)

    def work(self, rows: int, features: int) -> Work:
        return self.local.work(rows, features)

    def solving_bytes(self, rows: int, features: int) -> int:
        wide = max(rows, features)  # of a network whose other side is the narrow one
        return 72 * rows * features + 16 * wide**2 + 100_000 * wide  # of three matrices; the last is that of a tile

    def solves_rows_alone(self, pattern: Pattern) -> bool:
        return self.local.solves_rows_alone(pattern)

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        needs = self.local.needs
        own = needs(weight, statistics) if needs is not None and issubclass(needs, Importance) else statistics
        return self.local.solve(weight, own, pattern)

    @full_float32()
    def solve_feed_forward(self, problem: FeedForwardProblem) -> FeedForwardSolution:
        rounds = Alternation(self, problem)
        best = math.inf
        kept: list[torch.Tensor] = []
        errors: list[float] = []
        for turn in range(self.iterations):
            if turn:
                rounds.fit()
            rounds.prune()
            errors.append(rounds.update() if turn + 1 < self.iterations else rounds.error())
            if errors[-1] < best or not kept or self.keep == "last":
                best, kept = errors[-1], list(rounds.weights)
        weights = [weight.to(problem.up.weight.dtype) for weight in kept]
        return FeedForwardSolution(weights[0], weights[1] if problem.gate else None, weights[-1], best, errors[0])


@dataclass
class _Sums:
    """Sums over some of the tokens.

    Attributes:
        squares: a sum of squares, `[1]` float64.
        hidden: statistics of `p`; None where they are not taken.
        crosses: the sums for `fit`, one for each weight, likewise.
    """

    squares: torch.Tensor
    hidden: Gram | None
    crosses: list[torch.Tensor]

    @classmethod
    def of(cls, square: float, hidden: Gram | None = None, crosses: Sequence[torch.Tensor] = ()) -> _Sums:
        """Return sums with this sum of squares."""
        return cls(torch.tensor([square], dtype=torch.float64), hidden, list(crosses))

    @property
    def square(self) -> float:
        """The sum of squares."""
        return float(self.squares)

    def plus(self, later: _Sums) -> _Sums:
        self.squares += later.squares
        for own, added in zip(self.crosses, later.crosses, strict=True):
            own += added
        if self.hidden is not None and later.hidden is not None:
            self.hidden.include(later.hidden.total)
        return self

    def tensors(self) -> list[tuple[torch.Tensor, bool]]:
        found = [(tensor, False) for tensor in (self.squares, *self.crosses)]
        return found if self.hidden is None else [*found, (self.hidden.total, True)]


class Alternation:
    """The state of one network between the updates.

    Attributes:
        weights: those of up, gate (where there is one) and down, in float32.
        states: the auxiliary `z` and `s` of every token, in the model's dtype, outside the device's memory. `p` follows from them
            and the weights, and exists for one tile at a time.
    """

    def __init__(self, config: SparseLLM, problem: FeedForwardProblem) -> None:
        self.config, self.problem = config, problem
        self.firsts = [problem.up] if problem.gate is None else [problem.up, problem.gate]
        self.weights = [layer.weight.float() for layer in (*self.firsts, problem.down)]
        self.nonzeros = [weight != 0 for weight in self.weights]
        features, outputs = problem.up.weight.shape[0], problem.down.weight.shape[0]
        self.states = [problem.new_rows(features) for _ in self.firsts]
        self.target = problem.new_rows(outputs)  # without the bias, as everywhere here
        self.hidden = problem.hidden
        self.crosses: list[torch.Tensor] = []  # of the last update, for the fit that follows
        self.energy = problem.over_tokens(self._begin).square

    def _begin(self, tiles: Iterable[slice]) -> _Sums:
        """Keep the outputs of the dense network, and return their squared norm."""
        energy = 0.0
        for rows, _, outputs_of in self._tiles(tiles):
            target = self._activated(outputs_of) @ self.weights[-1].T
            energy += _energy(target)
            self.target.write(rows, target)
            for state, value in zip(self.states, outputs_of, strict=True):
                state.write(rows, value)
        return _Sums.of(energy)

    def prune(self) -> None:
        """Prune each linear by the local solver: up and gate from the statistics of the inputs, down from those of `p`."""
        layers = [*self.firsts, self.problem.down]
        statistics = [self.problem.inputs] * len(self.firsts) + [self.hidden]
        for i, (layer, statistic) in enumerate(zip(layers, statistics, strict=True)):
            self.weights[i] = self.config.solve(self.weights[i], statistic, layer.pattern).weight

    def error(self) -> float:
        """Return the relative squared error of the network's output with the current weights."""

        def sums_of(tiles: Iterable[slice]) -> _Sums:
            return _Sums.of(sum(self._squared_error(rows, outputs) for rows, _, outputs in self._tiles(tiles)))

        return self.problem.over_tokens(sums_of).square / (self.energy or 1.0)

    def update(self) -> float:
        """Update `p`, `z` and `s` in one pass over the tokens, accumulate the sums for `fit`, and return `error()` before the update.

        With `a = act(s) z` and the weight `W` of down, the best `p` is `a + (y - a W^T) K^-1 W`. `K = W W^T + gamma / beta I` is
        only as large as the output is wide. The residual is `y - p W^T = gamma / beta (y - a W^T) K^-1`, which `fit` uses too.
        """
        down, ratio = self.weights[-1], self.config.gamma / self.config.beta
        kernel = down @ down.T
        kernel.diagonal().add_(ratio)
        cholesky = torch.linalg.cholesky(kernel)
        pull = torch.cholesky_solve(down, cholesky)
        self.hidden = self.problem.hidden  # so that the last ones are freed
        self.crosses = []

        def sums_of(tiles: Iterable[slice]) -> _Sums:
            hidden, crosses = self.problem.hidden.empty(), [torch.zeros_like(weight) for weight in self.weights]
            squared_error = 0.0
            for rows, x, outputs in self._tiles(tiles):
                squared_error += self._squared_error(rows, outputs)
                states = [state.read(rows) for state in self.states]
                activated = self._activated(states)
                missing = self.target.read(rows) - activated @ down.T
                activated.addmm_(missing, pull)  # from here on p
                hidden.add(activated, None)
                ops.cross_gram_(crosses[-1], missing, activated)
                for i, value in enumerate(self._split(activated, outputs, states)):
                    self.states[i].write(rows, value)
                    ops.cross_gram_(crosses[i], value - outputs[i], x)
            return _Sums.of(squared_error, hidden, crosses)

        found = self.problem.over_tokens(sums_of)
        assert found.hidden is not None
        self.hidden, self.crosses = found.hidden, found.crosses
        self.hidden.tokens = self.problem.hidden.tokens
        self.crosses[-1] = torch.cholesky_solve(self.crosses[-1], cholesky).mul_(ratio)
        return found.square / (self.energy or 1.0)

    def fit(self) -> None:
        """Fit dense weights to the auxiliary activations by damped least squares."""
        statistics = [self.problem.inputs] * len(self.firsts) + [self.hidden]
        for i, (statistic, cross) in enumerate(zip(statistics, self.crosses, strict=True)):
            fitted = self.weights[i] + statistic.solve(cross, self.config.damping)
            if self.config.keep_zeros and not self.nonzeros[i].all():
                fitted, _, _ = ops.obs_sweep(fitted, statistic.factor(self.config.damping), mask=self.nonzeros[i])
            self.weights[i] = fitted

    def _tiles(self, tiles: Iterable[slice]) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """Yield for each of some tiles its rows, `x`, and the outputs of up (and gate)."""
        for rows in tiles:
            x = self.problem.x.read(rows)
            yield rows, x, [_linear(x, weight, layer) for weight, layer in zip(self.weights, self.firsts, strict=False)]

    def _activated(self, values: list[torch.Tensor]) -> torch.Tensor:
        activated = activate(values[-1], self.problem.activation)
        return activated if self.problem.gate is None else activated * values[0]

    def _squared_error(self, rows: slice, outputs: list[torch.Tensor]) -> float:
        return _energy(self._activated(outputs) @ self.weights[-1].T - self.target.read(rows))

    def _split(self, p: torch.Tensor, outputs: list[torch.Tensor], states: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        ratio = self.config.gamma / self.config.alpha
        if self.problem.gate is None:
            return (ops.plain_split(p, outputs[0], states[0], self.problem.activation, ratio, self.config.newton_steps),)
        up, gate = outputs
        return ops.gated_split(p, up, gate, states[1], self.problem.activation, ratio, self.config.newton_steps)


def _sees_tokens(method: LinearMethod) -> bool:
    return method.needs is not None and issubclass(method.needs, Importance) and method.needs.SEES_TOKENS


def _linear(x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.float())


def _energy(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)
