"""SparseGPT against the textbook algorithm, in float64 and in float32, and against its own formulas."""

import pytest
import torch

from baselines.textbook import textbook_sparsegpt
from sparsekern import NM, SparseGPT, Unstructured
from tests.methods.conftest import make_layer


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_equals_the_textbook_for_n_of_m(layer, n, m, block_size):
    expected, mask = textbook_sparsegpt(layer.weight, layer.gram64, n_zeros=m - n, m=m, blocksize=block_size)
    solution = SparseGPT(block_size=block_size).solve(layer.weight, layer.statistics(), NM(n, m))
    assert torch.equal(solution.weight != 0, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("zeros", [0.25, 0.5, 0.75])
def test_equals_the_textbook_for_a_sparsity(layer, zeros, block_size):
    count = layer.weight.shape[0] * block_size
    one_less = (int(count * zeros) - 1 + 0.5) / count  # the textbook prunes one more than it is asked for
    expected, mask = textbook_sparsegpt(layer.weight, layer.gram64, sparsity=one_less, blocksize=block_size)
    solution = SparseGPT(block_size=block_size).solve(layer.weight, layer.statistics(), Unstructured(zeros))
    assert torch.equal(solution.weight != 0, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-4, atol=1e-5)


def test_a_dead_feature_costs_nothing(layer):
    layer.x[:, 5] = 0
    expected, mask = textbook_sparsegpt(layer.weight, layer.gram64, n_zeros=2, m=4)
    solution = SparseGPT().solve(layer.weight, layer.statistics(), NM(2, 4))
    assert (solution.weight[:, 5] == 0).all()
    # The textbook's damping counts a one for the dead feature, so that weights agree but for that.
    assert ((solution.weight != 0) == mask).float().mean() > 0.99
    torch.testing.assert_close(solution.weight, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_row_error_is_that_of_the_stored_weights(pattern, dtype, tolerance):
    layer = make_layer(24, 64, 200, dtype=dtype)
    solution = SparseGPT().solve(layer.weight, layer.statistics(), pattern)
    delta = solution.weight.double() - layer.weight.double()
    expected = ((delta @ layer.gram64) * delta).sum(1)
    torch.testing.assert_close(solution.row_error, expected, rtol=tolerance, atol=0)


def test_row_error_with_fewer_tokens_than_features():
    layer = make_layer(16, 64, 20)
    solution = SparseGPT().solve(layer.weight, layer.statistics(), NM(2, 4))
    delta = solution.weight.double() - layer.weight.double()
    torch.testing.assert_close(solution.row_error, ((delta @ layer.gram64) * delta).sum(1), rtol=1e-2, atol=1e-3)


def test_error_is_far_below_that_of_choosing_only(layer):
    statistics = layer.statistics()
    swept = SparseGPT().solve(layer.weight, statistics, NM(2, 4)).row_error.sum()
    kept = SparseGPT().solve(layer.weight, statistics, NM(2, 4)).weight != 0
    cut = statistics.row_energy(layer.weight.masked_fill(kept, 0)).sum()
    assert swept < 0.8 * cut


@pytest.mark.parametrize("scope", ["block", "row", "matrix"])
def test_exactly_as_many_zeros_as_asked_for(layer, scope):
    solution = SparseGPT(scope=scope, block_size=24).solve(layer.weight, layer.statistics(), Unstructured(0.37))
    total = layer.weight.numel()
    if scope == "row":
        assert ((solution.weight == 0).sum(1) == int(64 * 0.37)).all()
    else:
        assert int((solution.weight == 0).sum()) == int(total * 0.37)


@pytest.mark.parametrize("mask", ["magnitude", "wanda"])
def test_fixed_mask_may_keep_a_weight_that_is_zero(layer, mask, monkeypatch):
    """A group of zeros keeps two of them, which the sweep fills."""
    from sparsekern.methods import sparsegpt

    layer.weight[3, 8:12] = 0
    given, sweep = [], sparsegpt.ops.obs_sweep
    monkeypatch.setattr(sparsegpt.ops, "obs_sweep", lambda *a, **k: given.append(k["mask"]) or sweep(*a, **k))
    solution = SparseGPT(mask=mask, keep_zeros=False).solve(layer.weight, layer.statistics(), NM(2, 4))
    assert (given[0].unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert torch.equal(solution.weight != 0, given[0])


@pytest.mark.parametrize("mask", ["magnitude", "wanda"])
def test_fixed_mask_is_that_method_s_and_the_weights_are_better(layer, mask):
    from sparsekern import Magnitude, Wanda

    statistics = layer.statistics()
    plain = {"magnitude": Magnitude(), "wanda": Wanda()}[mask].solve(layer.weight, statistics, NM(2, 4))
    solution = SparseGPT(mask=mask).solve(layer.weight, statistics, NM(2, 4))
    assert torch.equal(solution.weight != 0, plain.weight != 0)
    assert solution.row_error.sum() < 0.9 * statistics.row_energy(plain.weight - layer.weight).sum()


def test_refit_of_zeros_that_are_there(layer):
    from sparsekern import Magnitude

    plain = Magnitude().solve(layer.weight, None, NM(2, 4))
    solution = SparseGPT(mask="zeros").solve(plain.weight, layer.statistics(), NM(2, 4))
    assert torch.equal(solution.weight != 0, plain.weight != 0)
    torch.testing.assert_close(solution.weight, plain.weight)  # nothing was removed, so there is nothing to make up for


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_refit_wants_the_pattern_to_be_there(layer, pattern):
    with pytest.raises(ValueError, match="mask='zeros': the weight's zeros do not make up the pattern"):
        SparseGPT(mask="zeros").solve(layer.weight, layer.statistics(), pattern)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"damping": -0.1}, "SparseGPT.damping: expected a number of at least 0, got -0.1"),
        ({"damping": float("nan")}, "SparseGPT.damping"),
        ({"damping": "x"}, "SparseGPT.damping"),
        ({"block_size": 0}, "SparseGPT.block_size: expected a whole number of at least 1, got 0"),
        ({"block_size": 1.5}, "SparseGPT.block_size"),
        ({"scope": "layer"}, "SparseGPT.scope: expected one of 'block', 'row', 'matrix', got 'layer'"),
        ({"mask": "random"}, "SparseGPT.mask: expected one of None, 'magnitude', 'wanda', 'zeros', got 'random'"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(**arguments)


def test_is_frozen():
    with pytest.raises(AttributeError):
        SparseGPT().damping = 0.1
