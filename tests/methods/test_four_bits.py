from __future__ import annotations

import itertools

import pytest
import torch

from sparsekern import ops
from sparsekern.layouts.q4_grid import grid_scales
from sparsekern.methods import ALPS, FourBits, Gram, KPrune, Magnitude, SparseGPT, SparseLLM, Wanda, with_values
from sparsekern.pattern import NM


@pytest.fixture
def problem(generator):
    """A weight, and a Gram matrix of correlated inputs."""
    x = torch.randn(400, 96, generator=generator) @ (torch.eye(96) + 0.1 * torch.randn(96, 96, generator=generator))
    gram = Gram(96, torch.device("cpu"))
    gram.add(x, None)
    return torch.randn(24, 96, generator=generator), gram, x.double()


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_keeps_the_mask_of_the_pruner_and_reports_both_errors(problem, pruner):
    weight, gram, x = problem
    found = FourBits(pruner).solve(weight, gram, NM(2, 4))
    mask = pruner.solve(weight, gram, NM(2, 4)).weight != 0
    assert (found.weight[~mask] == 0).all() and grid_scales(found.weight) is not None
    outputs = x @ (found.weight - weight).double().T
    torch.testing.assert_close(found.row_error, outputs.square().sum(0), rtol=1e-4, atol=1e-2)
    fitted, _ = ops.masked_lstsq(weight, gram.gram, mask, damping=0.01)
    alone = (x @ (fitted - weight).double().T).square().sum(0)
    # The fit has no gradient on the mask, so the errors add up, but for the damping.
    torch.testing.assert_close(found.row_error, alone + found.values_error, rtol=0.02, atol=0)


def test_what_solving_takes_is_counted():
    """The most of what lives at once: the pruner's, or seven matrices of weights, a mask and a Gram matrix of the rounding's own."""
    for rows, features in ((4096, 128), (128, 1024)):
        for pruner in (Wanda(), SparseGPT(), ALPS()):
            counted = FourBits(pruner).solving_bytes(rows, features)
            assert counted >= pruner.solving_bytes(rows, features)
            assert counted >= 33 * rows * features + 4 * features**2


def test_compensation_beats_rounding(problem):
    """The sweep leaves less error than rounding each weight for itself, and the descent less than the sweep."""
    weight, gram, x = problem
    mask = ops.nm_mask(weight.abs(), "2:4")
    fitted, _ = ops.masked_lstsq(weight, gram.gram, mask, damping=0.01)
    scales = ops.q4_scales(fitted, torch.ones(96))
    plain = ops.nm_q4_unpack(ops.nm_q4_pack(fitted, scales, 2, 4), 2, 4, *weight.shape)[0]
    errors = [float((x @ (fitted - plain).double().T).square().sum())]
    for passes in (0, 3):
        found = FourBits(Magnitude(), passes=passes).solve(weight, gram, NM(2, 4))
        errors.append(float(found.values_error.sum()))
    assert errors[0] > 1.1 * errors[2] and all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_what_is_refused():
    assert with_values(Magnitude(), None) == Magnitude() and with_values(Wanda(), "int4") == FourBits(Wanda())
    for method in (SparseLLM(), KPrune()):
        with pytest.raises(ValueError, match=f"values: expected None, or a method that solves one linear .*got '{method.name}'"):
            with_values(method, "int4")
    with pytest.raises(ValueError, match="values: expected 'int4' or None, got 'int8'"):
        with_values(Magnitude(), "int8")
