"""SparseLLM: each update minimises what it says it does, none raises the objective, and dense weights are a fixed point."""

import json

import pytest
import torch

from sparsekern import NM, Magnitude, SparseGPT, SparseLLM, Unstructured
from sparsekern._activations import activate
from sparsekern.methods import Solution
from sparsekern.methods.network import FeedForwardProblem, Layer
from sparsekern.methods.sparsellm import Alternation
from sparsekern.methods.statistics import Gram

FORMS = [("relu", False), ("gelu", False), ("silu", True), ("gelu_tanh", True)]
EVERY_FORM = pytest.mark.parametrize("activation, gated", FORMS)
TOKENS, INPUTS, FEATURES, OUTPUTS = 150, 12, 20, 8


class Rows:
    """In memory, so that tests can look at them."""

    def __init__(self, values):
        self.values = values

    def read(self, rows):
        return self.values[rows].clone()

    def write(self, rows, values):
        self.values[rows] = values


def make_problem(activation: str, gated: bool, sparsity: float | NM = 0.6, tile: int = TOKENS) -> FeedForwardProblem:
    generator = torch.Generator().manual_seed(0)
    pattern = sparsity if isinstance(sparsity, NM) else Unstructured(sparsity)
    x = torch.randn(TOKENS, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)

    def layer(rows: int, columns: int) -> Layer:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return Layer(weight, torch.randn(rows, generator=generator) * 0.3, pattern)

    up, gate, down = layer(FEATURES, INPUTS), layer(FEATURES, INPUTS) if gated else None, layer(OUTPUTS, FEATURES)
    hidden = activate(x @ (gate or up).weight.T + (gate or up).bias, activation)
    if gated:
        hidden = hidden * (x @ up.weight.T + up.bias)
    grams = [Gram(INPUTS, x.device), Gram(FEATURES, x.device)]
    grams[0].add(x, None)
    grams[1].add(hidden, None)
    tiles = [slice(start, min(start + tile, TOKENS)) for start in range(0, TOKENS, tile)]
    return FeedForwardProblem(
        up, gate, down, activation, *grams, Rows(x), lambda width: Rows(torch.empty(TOKENS, width)), lambda sums_of: sums_of(tiles)
    )


class Watched(Alternation):
    """An alternation that keeps `p`, of all tokens, for the objective to be computed in float64."""

    p = None

    def _split(self, p, outputs, states):
        self.p = p.clone()
        return super()._split(p, outputs, states)

    def objective(self, p=None, weights=None, states=None) -> torch.Tensor:
        config, problem = self.config, self.problem
        p = (self.p if p is None else p).double()
        weights = [weight.double() for weight in weights or self.weights]
        states = [state.double() for state in states or [state.values for state in self.states]]
        outputs = [problem.x.values.double() @ w.T + layer.bias.double() for w, layer in zip(weights, self.firsts, strict=False)]
        made = activate(states[-1], problem.activation) * (states[0] if problem.gate else 1)
        return (
            config.beta * (p @ weights[-1].T - self.target.values.double()).square().sum()
            + config.gamma * (p - made).square().sum()
            + config.alpha * sum((state - output).square().sum() for state, output in zip(states, outputs, strict=True))
        )


def pruned_once(activation: str, gated: bool, **settings) -> Watched:
    rounds = Watched(SparseLLM(**settings), make_problem(activation, gated))
    rounds.prune()
    return rounds


@EVERY_FORM
def test_no_update_raises_the_objective(activation, gated):
    rounds = pruned_once(activation, gated, alpha=0.7, beta=2.0, gamma=1.3)
    for _ in range(3):
        activated = activate(rounds.states[-1].values, activation) * (rounds.states[0].values if gated else 1)
        old_states = [state.values.clone() for state in rounds.states]
        before = rounds.objective(p=activated)
        rounds.update()
        after_p = rounds.objective(states=old_states)
        after_split = rounds.objective()
        rounds.fit()
        after_fit = rounds.objective()
        assert after_p <= before * (1 + 1e-6) and after_split <= after_p * (1 + 1e-6) and after_fit <= after_split * (1 + 1e-6)
        assert after_fit < 0.99 * before
        rounds.prune()


@EVERY_FORM
def test_p_is_the_minimiser_and_woodbury_the_direct_solution(activation, gated):
    rounds = pruned_once(activation, gated, beta=3.0, gamma=2.0)
    states = [state.values.double() for state in rounds.states]
    made = activate(states[-1], activation) * (states[0] if gated else 1)
    down, y = rounds.weights[-1].double(), rounds.target.values.double()
    rounds.update()
    direct = torch.linalg.solve(3 * down.T @ down + 2 * torch.eye(FEATURES, dtype=torch.float64), (3 * y @ down + 2 * made).T).T
    torch.testing.assert_close(rounds.p.double(), direct, rtol=1e-4, atol=1e-5)
    p = direct.clone().requires_grad_()
    (3 * (p @ down.T - y).square().sum() + 2 * (p - made).square().sum()).backward()
    assert p.grad.abs().max() < 1e-9


@EVERY_FORM
def test_fit_is_least_squares_once_the_damping_is_small(activation, gated):
    rounds = pruned_once(activation, gated, damping=1e-7)
    rounds.update()
    states = [state.values.double() for state in rounds.states]
    x, p, y = rounds.problem.x.values.double(), rounds.p.double(), rounds.target.values.double()
    rounds.fit()
    sides = [(x, state - layer.bias.double()) for state, layer in zip(states, rounds.firsts, strict=True)] + [(p, y)]
    for weight, (given, wanted) in zip(rounds.weights, sides, strict=True):
        expected = torch.linalg.lstsq(given, wanted).solution.T
        residual, least = ((given @ w.double().T - wanted).square().sum() for w in (weight, expected))
        assert residual <= least * (1 + 1e-4) + 1e-9 * wanted.square().sum()


@EVERY_FORM
def test_dense_weights_are_a_fixed_point_at_zero_sparsity(activation, gated):
    rounds = Watched(SparseLLM(), make_problem(activation, gated, 0.0))
    for _ in range(3):
        rounds.prune()
        assert rounds.update() < 1e-12
        rounds.fit()
    for weight, layer in zip(rounds.weights, [*rounds.firsts, rounds.problem.down], strict=True):
        torch.testing.assert_close(weight, layer.weight, rtol=1e-4, atol=1e-5)


@EVERY_FORM
def test_tiles_do_not_change_the_result(activation, gated):
    whole = SparseLLM().solve_feed_forward(make_problem(activation, gated))
    tiled = SparseLLM().solve_feed_forward(make_problem(activation, gated, tile=64))
    assert tiled.error == pytest.approx(whole.error, rel=1e-3) and tiled.alone == pytest.approx(whole.alone, rel=1e-3)
    torch.testing.assert_close(tiled.down, whole.down, rtol=1e-2, atol=1e-3)


@EVERY_FORM
def test_better_than_the_solver_alone_and_errors_are_those_of_the_definition(activation, gated):
    problem = make_problem(activation, gated)
    solution = SparseLLM(attention="pruned").solve_feed_forward(problem)
    assert solution.error < 0.97 * solution.alone

    def output(up, gate, down):
        x = problem.x.values.double()
        made = x @ up.double().T + problem.up.bias
        if gate is None:
            return activate(made, activation) @ down.double().T
        return (activate(x @ gate.double().T + problem.gate.bias, activation) * made) @ down.double().T

    y = output(problem.up.weight, problem.gate and problem.gate.weight, problem.down.weight)
    error = (output(solution.up, solution.gate, solution.down) - y).square().sum() / y.square().sum()
    assert solution.error == pytest.approx(float(error), rel=1e-4)
    for weight in filter(lambda w: w is not None, (solution.up, solution.gate, solution.down)):
        assert int((weight == 0).sum()) == int(0.6 * weight.numel())


def test_one_round_is_the_solver_alone():
    problem = make_problem("silu", True, NM(2, 4))
    solution = SparseLLM(iterations=1).solve_feed_forward(problem)
    assert torch.equal(solution.up, SparseGPT().solve(problem.up.weight, problem.inputs, NM(2, 4)).weight)
    assert torch.equal(solution.down, SparseGPT().solve(problem.down.weight, problem.hidden, NM(2, 4)).weight)
    assert solution.error == solution.alone


def test_the_best_round_is_kept_or_the_last():
    errors = []

    class Spy(SparseLLM):
        pass

    problem = make_problem("relu", False)
    rounds = Alternation(Spy(), problem)
    for turn in range(4):
        if turn:
            rounds.fit()
        rounds.prune()
        errors.append(rounds.update())
    assert SparseLLM(keep="best").solve_feed_forward(problem).error == pytest.approx(min(errors))
    assert SparseLLM(keep="last").solve_feed_forward(problem).error == pytest.approx(errors[-1])


@pytest.mark.parametrize("solver", ["magnitude", "wanda", Magnitude(scope="row"), SparseGPT(block_size=8)])
def test_any_local_solver(solver):
    solution = SparseLLM(solver=solver, iterations=3).solve_feed_forward(make_problem("silu", True))
    assert solution.error <= solution.alone
    assert int((solution.up == 0).sum()) == pytest.approx(0.6 * solution.up.numel(), abs=20)


def test_half_precision_weights_and_a_dead_feature():
    problem = make_problem("silu", True)
    problem.x.values[:, 3] = 0
    grams = Gram(INPUTS, torch.device("cpu"))
    grams.add(problem.x.values, None)
    half = [
        Layer(layer.weight.bfloat16(), layer.bias.bfloat16(), layer.pattern) for layer in (problem.up, problem.gate, problem.down)
    ]
    solution = SparseLLM().solve_feed_forward(
        FeedForwardProblem(*half, "silu", grams, problem.hidden, problem.x, problem.new_rows, problem.over_tokens)
    )
    assert solution.up.dtype == solution.down.dtype == torch.bfloat16
    assert (solution.up[:, 3] == 0).all() and solution.error < 1


def test_other_linears_are_solved_by_the_solver(layer):
    statistics = layer.statistics()
    mine, its = (method.solve(layer.weight, statistics, NM(2, 4)) for method in (SparseLLM(), SparseGPT()))
    assert isinstance(mine, Solution) and torch.equal(mine.weight, its.weight)


def test_settings_name_the_solver():
    settings = SparseLLM(solver=SparseGPT(damping=0.1)).settings()
    assert settings["solver"]["name"] == "sparsegpt" and settings["solver"]["damping"] == 0.1
    assert json.loads(json.dumps(settings)) == settings
    assert SparseLLM().settings()["solver"] == SparseGPT().settings()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"alpha": 0}, "SparseLLM.alpha: expected a number above 0, got 0"),
        ({"beta": float("inf")}, "SparseLLM.beta: expected a number above 0, got inf"),
        ({"gamma": "x"}, "SparseLLM.gamma: expected a number above 0, got 'x'"),
        ({"damping": -1.0}, "SparseLLM.damping: expected a number above 0, got -1.0"),
        ({"iterations": 0}, "SparseLLM.iterations: expected a whole number of at least 1, got 0"),
        ({"newton_steps": True}, "SparseLLM.newton_steps: expected a whole number of at least 1, got True"),
        ({"attention": "later"}, "SparseLLM.attention: expected one of 'dense', 'pruned', got 'later'"),
        ({"keep": "all"}, "SparseLLM.keep: expected one of 'best', 'last', got 'all'"),
        ({"solver": "optimal"}, "SparseLLM.solver: method: expected one of .* got 'optimal'"),
        ({"solver": SparseLLM()}, "SparseLLM.solver: expected a method that solves one linear"),
        ({"solver": "gradual"}, "SparseLLM.solver: expected a method that solves one linear"),
        ({"solver": "copal"}, "SparseLLM.solver: expected a method that solves one linear"),
        ({"solver": "kprune"}, "SparseLLM.solver: expected a method that solves one linear"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseLLM(**arguments)


def test_refuses_a_solver_of_another_type():
    with pytest.raises(TypeError, match="SparseLLM.solver: method: expected a name or a config"):
        SparseLLM(solver=3)
