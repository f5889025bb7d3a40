from __future__ import annotations

import itertools

import pytest
import torch

from sparsekern.layouts.nm_q4 import COLUMNS, nearest_multiple
from sparsekern.ops import quantize_descent_
from sparsekern.ops.obs_quantize import problem


def start_of(rows: int, columns: int, generator: torch.Generator):
    target, hessian, mask, scales = problem(rows, columns, generator)
    weight = nearest_multiple(target, scales.float().repeat_interleave(COLUMNS, 1)[:, :columns]) * mask
    return weight, target, hessian, mask, scales


def error_of(weight: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    change = (weight - target).double()
    return ((change @ hessian.double()) * change).sum(1)


def test_each_pass_lowers_the_error_and_keeps_the_residual(isa, generator):
    for rows, columns in ((1, 1), (3, 70), (35, 130)):
        weight, target, hessian, mask, scales = start_of(rows, columns, generator)
        residual, kept = (weight - target) @ hessian, mask
        errors = [error_of(weight, target, hessian)]
        for _ in range(3):
            assert quantize_descent_(weight, residual, hessian, mask, scales, 1) is weight
            errors.append(error_of(weight, target, hessian))
            torch.testing.assert_close(residual, (weight - target) @ hessian, rtol=1e-4, atol=1e-4)
        assert all((after <= before * (1 + 1e-6)).all() for before, after in itertools.pairwise(errors))
        assert columns < 70 or errors[1].sum() < 0.95 * errors[0].sum()
        codes = weight.double() / scales.double().repeat_interleave(COLUMNS, 1)[:, :columns]
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= 8 and (weight[~kept] == 0).all()


def test_ends_where_no_single_weight_can_move(isa, generator):
    weight, target, hessian, mask, scales = start_of(3, 40, generator)
    quantize_descent_(weight, (weight - target) @ hessian, hessian, mask, scales, 50)
    least = error_of(weight, target, hessian)
    for column in range(40):
        for step in (-1, 1):
            moved = weight.clone()
            moved[:, column] += step * scales[:, 0].float()
            allowed = mask[:, column] & ((moved[:, column] / scales[:, 0]).abs() <= 7)
            assert (error_of(moved, target, hessian)[allowed] >= least[allowed] * (1 - 1e-5)).all()


def test_passes_are_repeated_calls(isa, generator):
    weight, target, hessian, mask, scales = start_of(20, 100, generator)
    residual = (weight - target) @ hessian
    twice, its = weight.clone(), residual.clone()
    quantize_descent_(weight, residual, hessian, mask, scales, 2)
    for _ in range(2):
        quantize_descent_(twice, its, hessian, mask, scales)
    assert torch.equal(weight, twice) and torch.equal(residual, its)
    assert torch.equal(quantize_descent_(weight.clone(), residual, hessian, mask, scales, 0), weight)


def test_a_dead_feature_is_left(isa, generator):
    weight, target, hessian, mask, scales = start_of(4, 30, generator)
    hessian[3], hessian[:, 3] = 0, 0
    before = weight[:, 3].clone()
    quantize_descent_(weight, (weight - target) @ hessian, hessian, mask, scales, 2)
    assert torch.equal(weight[:, 3], before)


def test_arguments_are_refused(generator):
    weight, target, hessian, mask, scales = start_of(5, 72, generator)
    sound = {"weight": weight, "residual": (weight - target) @ hessian, "hessian": hessian, "mask": mask, "scales": scales}
    for changed, message in (
        ({"weight": weight.half()}, "weight: expected dtype float32, got float16"),
        ({"residual": weight[:, :70]}, r"residual: expected shape \(5, 72\), got \(5, 70\)"),
        ({"hessian": hessian[:70, :70]}, r"hessian: expected shape \(72, 72\), got \(70, 70\)"),
        ({"mask": mask.int()}, "mask: expected dtype bool, got int32"),
        ({"scales": scales[1:]}, r"scales: expected shape \(5, 2\), got \(4, 2\)"),
        ({"passes": -1}, "passes: expected at least 0, got -1"),
        ({"passes": 1.5}, "passes: expected a whole number, got 1.5"),
        ({"hessian": hessian * torch.inf}, "hessian: expected finite values"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            quantize_descent_(**(sound | changed))
