"""`MaskedAdamW`: the norm of the gradient is that of kept weights, whatever pruned ones hold."""

import math

import pytest
import torch
from torch import nn

from sparsekern.training.masked_adamw import MaskedAdamW, Trained


def trained(generator) -> list[Trained]:
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 8), (5,))]
    mask = torch.rand(6, 8, generator=generator) < 0.5
    with torch.no_grad():
        parameters[0].mul_(mask)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [Trained("matrix", parameters[0], mask), Trained("vector", parameters[1])]


@pytest.mark.parametrize("value", [0.0, 7.0, math.nan, math.inf, -math.inf])
def test_gradients_of_pruned_weights_count_for_nothing(generator, value):
    matrix, vector = trained(generator)
    gradients = (matrix.parameter.grad[matrix.mask], vector.parameter.grad)
    expected = float(torch.cat(gradients).double().norm())
    matrix.parameter.grad[~matrix.mask] = value
    before = matrix.parameter.detach().clone()
    assert MaskedAdamW([matrix, vector]).step(0.1, clip=1.0) == pytest.approx(expected, rel=1e-6)
    changed = matrix.parameter.detach() != before
    assert torch.equal(changed, matrix.mask) and matrix.parameter.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_of_a_kept_weight_that_is_not_finite_changes_nothing(generator, value):
    matrix, vector = trained(generator)
    vector.parameter.grad[2] = value
    before = [of.parameter.detach().clone() for of in (matrix, vector)]
    optimizer = MaskedAdamW([matrix, vector])
    assert math.isnan(optimizer.step(0.1, clip=1.0)) and optimizer.steps == 0
    assert all(torch.equal(of.parameter, value) for of, value in zip((matrix, vector), before, strict=True))
