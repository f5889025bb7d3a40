import pytest
import torch

from baselines.textbook import textbook_wanda
from sparsekern import NM, Unstructured, Wanda
from sparsekern.methods.statistics import FeatureNorm


def feature_norm(layer) -> FeatureNorm:
    statistics = FeatureNorm(layer.x.shape[1], layer.x.device)
    for part in layer.x.split(70):
        statistics.add(part, None)
    return statistics


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.37, 0.7])
def test_equals_the_textbook_for_a_sparsity(layer, sparsity):
    expected, mask = textbook_wanda(layer.weight, layer.gram64.diagonal(), sparsity=sparsity)
    solution = Wanda().solve(layer.weight, feature_norm(layer), Unstructured(sparsity))
    assert torch.equal(Wanda().mask_of(layer.weight, feature_norm(layer), Unstructured(sparsity)), mask)
    assert torch.equal(solution.weight, expected)
    assert ((solution.weight == 0).sum(1) == int(64 * sparsity)).all()
    assert solution.row_error is None


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (5, 8)])
def test_equals_the_textbook_for_n_of_m(layer, n, m):
    expected, mask = textbook_wanda(layer.weight, layer.gram64.diagonal(), n_zeros=m - n, m=m)
    solution = Wanda().solve(layer.weight, feature_norm(layer), NM(n, m))
    assert torch.equal(Wanda().mask_of(layer.weight, feature_norm(layer), NM(n, m)), mask)
    assert torch.equal(solution.weight, expected)


def test_a_gram_matrix_serves_as_well(layer):
    one = Wanda().mask_of(layer.weight, feature_norm(layer), NM(2, 4))
    other = Wanda().mask_of(layer.weight, layer.statistics(), NM(2, 4))
    assert torch.equal(one, other)


def test_weights_of_dead_features_go_first(layer):
    layer.x[:, 8:16] = 0
    solution = Wanda().solve(layer.weight, feature_norm(layer), Unstructured(0.25))
    assert (solution.weight[:, 8:16] == 0).all()


def test_keeps_the_dtype_and_the_values_of_what_stays(layer):
    weight = layer.weight.bfloat16()
    solution = Wanda().solve(weight, feature_norm(layer), NM(2, 4))
    assert solution.weight.dtype == torch.bfloat16
    assert torch.equal(solution.weight, torch.where(Wanda().mask_of(weight, feature_norm(layer), NM(2, 4)), weight, 0))
