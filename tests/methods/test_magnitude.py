import pytest
import torch

from sparsekern import NM, Magnitude, Unstructured
from tests.textbook import textbook_magnitude


def test_equals_the_textbook_over_the_matrix(layer):
    total = layer.weight.numel()
    expected, mask = textbook_magnitude(layer.weight, sparsity=(total // 2 - 0.5) / total)  # the textbook prunes one more
    solution = Magnitude().solve(layer.weight, None, Unstructured(0.5))
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.weight, expected)
    assert int((~mask).sum()) == total // 2


def test_counts_each_row_by_itself(layer):
    solution = Magnitude(scope="row").solve(layer.weight, None, Unstructured(0.3))
    for row, mask in zip(layer.weight, solution.mask, strict=True):
        assert int((~mask).sum()) == int(64 * 0.3)
        assert row[~mask].abs().max() < row[mask].abs().min()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 8)])
def test_equals_the_textbook_for_n_of_m(layer, n, m):
    expected, mask = textbook_magnitude(layer.weight, n_zeros=m - n, m=m)
    solution = Magnitude().solve(layer.weight, None, NM(n, m))
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.weight, expected)


def test_ties_are_cut_exactly():
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    solution = Magnitude().solve(weight, None, Unstructured(0.5))
    assert int((~solution.mask).sum()) == 16
    assert solution.mask[:2].all()  # of equal weights the lower index is kept


def test_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="Magnitude.scope: expected one of 'matrix', 'row', got 'block'"):
        Magnitude(scope="block")
