"""ALPS against the textbook algorithm in float64, against its own definition, and where the weights or the inputs are degenerate."""

import json
import warnings

import pytest
import torch

from baselines.textbook import textbook_alps
from sparsekern import ALPS, NM, Magnitude, SparseGPT, SparsekernWarning, Unstructured
from sparsekern.methods import alps
from tests.methods.conftest import make_layer

PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(1, 4)]
by_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def error(layer, weight: torch.Tensor) -> torch.Tensor:
    delta = weight.double() - layer.weight.double()
    return ((delta @ layer.gram64) * delta).sum(1)


def textbook(layer, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    target = {"n_kept": pattern.n, "m": pattern.m} if isinstance(pattern, NM) else {"sparsity": pattern.sparsity}
    return textbook_alps(layer.weight, layer.gram64, **target)


@by_pattern
def test_is_as_good_as_the_textbook(pattern):
    for seed in range(3):
        layer = make_layer(32, 64, 200, seed)
        ours = error(layer, ALPS().solve(layer.weight, layer.statistics(), pattern).weight).sum()
        theirs = error(layer, textbook(layer, pattern)[0]).sum()
        assert ours < 1.02 * theirs


@by_pattern
def test_the_steps_are_the_textbook_s(monkeypatch, pattern):
    """With the same few iterations and the same end, in exact arithmetic the masks are the same."""
    layer = make_layer(32, 64, 200)
    _, mask = textbook_alps_support(layer, pattern, iterations=6)
    monkeypatch.setattr(alps.ops, "masked_lstsq", lambda target, gram, mask, **_: (target * mask, None))
    with pytest.warns(SparsekernWarning):
        ours = ALPS(tolerance=0.0, max_iterations=6).solve(layer.weight, layer.statistics(), pattern).weight != 0
    assert (ours == mask).float().mean() > 0.998


def textbook_alps_support(layer, pattern, iterations):
    """The support of the projected iterate, which the public program projects once more from the dense one."""
    gram = layer.gram64 + 0.01 * layer.gram64.diagonal().mean() * torch.eye(len(layer.gram64), dtype=torch.float64)
    scale = gram.diagonal().sqrt()
    gram, dense = gram / scale / scale[:, None], layer.weight.double() * scale
    kept = (
        dense.numel() // pattern.m * pattern.n if isinstance(pattern, NM) else dense.numel() - int(dense.numel() * pattern.sparsity)
    )
    support_of = keep_nm if isinstance(pattern, NM) else keep_matrix
    rho, dual, mask = 0.1, torch.zeros_like(dense), support_of(dense, pattern, kept)
    sparse, seen = dense * mask, mask
    for iteration in range(iterations):
        right = dense @ gram - dual + rho * sparse
        solution = torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=torch.float64), right.T).T
        mask = support_of(solution + dual / rho, pattern, kept)
        sparse = (solution + dual / rho) * mask
        dual = dual + rho * (solution - sparse)
        if iteration % 3 == 2:
            changed = int((mask != seen).sum()) / kept
            rho, seen = rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), mask
    return sparse, mask


def keep_nm(z, pattern, kept):
    groups = z.abs().view(-1, pattern.m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(pattern.n, dim=1).indices, True).view_as(z)


def keep_matrix(z, pattern, kept):
    return z.abs() >= z.abs().flatten().topk(kept).values[-1]


@by_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_far_below_that_of_sparsegpt_and_reported(pattern, dtype):
    layer = make_layer(24, 64, 200, dtype=dtype)
    solution = ALPS().solve(layer.weight, layer.statistics(), pattern)
    assert solution.weight.dtype == dtype
    torch.testing.assert_close(solution.row_error, error(layer, solution.weight), rtol=1e-3, atol=0)
    swept = SparseGPT().solve(layer.weight, layer.statistics(), pattern)
    assert solution.row_error.sum() < 0.85 * error(layer, swept.weight).sum()


@by_pattern
def test_weights_are_the_least_squares_ones_of_their_mask(layer, pattern):
    solution = ALPS().solve(layer.weight, layer.statistics(), pattern)
    gram = layer.gram64 + 0.01 * layer.gram64.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    best = torch.zeros_like(layer.weight, dtype=torch.float64)
    for row, support in enumerate(solution.weight != 0):
        best[row, support] = torch.linalg.solve(gram[support][:, support], gram[support] @ layer.weight[row].double())
    assert error(layer, solution.weight).sum() < 1.003 * error(layer, best).sum()


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_exactly_as_many_zeros_as_asked_for(layer, scope, sparsity):
    solution = ALPS(scope=scope).solve(layer.weight, layer.statistics(), Unstructured(sparsity))
    if scope == "row":
        assert ((solution.weight == 0).sum(1) == int(64 * sparsity)).all()
    else:
        assert int((solution.weight == 0).sum()) == int(layer.weight.numel() * sparsity)
    if sparsity == 0:
        torch.testing.assert_close(solution.weight, layer.weight, rtol=1e-5, atol=1e-6)


@by_pattern
def test_the_same_twice_and_nothing_is_changed_in_place(layer, pattern):
    weight, statistics = layer.weight.clone(), layer.statistics()
    first = ALPS().solve(layer.weight, statistics, pattern)
    again = ALPS().solve(layer.weight, statistics, pattern)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(layer.weight, weight)


@pytest.fixture
def masks(monkeypatch):
    """The masks that least squares is asked to solve on."""
    found, solve = [], alps.ops.masked_lstsq
    monkeypatch.setattr(
        alps.ops, "masked_lstsq", lambda target, gram, mask, **k: found.append(mask) or solve(target, gram, mask, **k)
    )
    return found


@by_pattern
def test_dead_features_are_pruned_first(layer, pattern, masks):
    layer.x[:, 20:24] = 0
    solution = ALPS().solve(layer.weight, layer.statistics(), pattern)
    assert (solution.weight[:, 20:24] == 0).all()
    if isinstance(pattern, NM):
        assert (masks[0].unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()
    else:
        assert not masks[0][:, 20:24].any()


@by_pattern
@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
def test_any_damping_and_fewer_tokens_than_features(pattern, damping):
    layer = make_layer(24, 64, 30)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error" if damping else "ignore"
        )  # undamped, some rows are not determined, and may be said to be open
        solution = ALPS(damping=damping).solve(layer.weight, layer.statistics(), pattern)
    assert solution.weight.isfinite().all()
    assert solution.row_error.sum() < 0.5 * error(layer, torch.zeros_like(layer.weight)).sum()


def test_no_inputs_at_all(layer, masks):
    layer.x.zero_()
    solution = ALPS().solve(layer.weight, layer.statistics(), NM(2, 4))
    assert (solution.weight == 0).all() and (masks[0].unflatten(1, (-1, 4)).sum(2) == 2).all()


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.1)], ids=str)
@pytest.mark.parametrize("rho", [1e-3, 1.0, 1e4])
def test_a_penalty_that_is_far_off_finds_its_way(layer, rho, pattern):
    expected = ALPS().solve(layer.weight, layer.statistics(), pattern).row_error.sum()
    assert ALPS(rho=rho).solve(layer.weight, layer.statistics(), pattern).row_error.sum() < 1.25 * expected


@pytest.mark.parametrize("place", [(3, 3), (40, 7)])
def test_a_gram_matrix_that_is_not_finite(layer, place):
    statistics = layer.statistics()
    statistics.gram[place] = torch.nan
    with pytest.raises(ValueError, match="gram: expected finite values, got nan at"):
        ALPS().solve(layer.weight, statistics, NM(2, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@by_pattern
def test_a_weight_that_is_not_finite(layer, pattern, bad):
    layer.weight[3, 5] = bad
    with pytest.raises(ValueError, match=rf"weight: expected finite values, got {bad} at \[3, 5\]"):
        ALPS().solve(layer.weight, layer.statistics(), pattern)


def test_restarts_are_bounded(layer, monkeypatch):
    """A weight that has the pattern already: no penalty makes the mask move."""
    restarts = []
    restart = alps._Admm.restart
    monkeypatch.setattr(alps._Admm, "restart", lambda admm, rho: restarts.append(rho) or restart(admm, rho))
    sparse = Magnitude().solve(layer.weight, None, NM(2, 4)).weight
    solution = ALPS().solve(sparse, layer.statistics(), NM(2, 4))
    torch.testing.assert_close(solution.weight, sparse)
    assert restarts == pytest.approx([0.1, 0.02, 0.004, 0.0008])


def test_max_iterations_is_the_most_and_it_is_said(layer, monkeypatch):
    steps = []
    step = alps.ops.admm_step_
    monkeypatch.setattr(alps.ops, "admm_step_", lambda *a, **k: steps.append(0) or step(*a, **k))
    message = (
        r"ALPS.max_iterations: ADMM did not settle in 7 iterations; the last 1 changed \d+\.\d\d% of the mask, and .* is 0.00%"
    )
    with pytest.warns(SparsekernWarning, match=message) as said:
        ALPS(max_iterations=7, tolerance=0).solve(layer.weight, layer.statistics(), NM(2, 4))
    assert len(said) == 1
    assert len(steps) == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"damping": -0.1}, "ALPS.damping: expected a number of at least 0, got -0.1"),
        ({"damping": float("nan")}, "ALPS.damping: expected a number of at least 0, got nan"),
        ({"rho": 0}, "ALPS.rho: expected a number above 0, got 0"),
        ({"rho": float("inf")}, "ALPS.rho: expected a number above 0, got inf"),
        ({"tolerance": "x"}, "ALPS.tolerance: expected a number of at least 0, got 'x'"),
        ({"max_iterations": 0}, "ALPS.max_iterations: expected a whole number of at least 1, got 0"),
        ({"max_iterations": True}, "ALPS.max_iterations: expected a whole number of at least 1, got True"),
        ({"scope": "block"}, "ALPS.scope: expected one of 'matrix', 'row', got 'block'"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ALPS(**arguments)


def test_is_frozen_and_goes_through_json():
    with pytest.raises(AttributeError):
        ALPS().damping = 0.1
    assert json.loads(json.dumps(ALPS().settings()))["name"] == "alps"
