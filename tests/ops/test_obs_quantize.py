from __future__ import annotations

import pytest
import torch

from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.ops import obs_quantize, obs_sweep, reverse_cholesky
from sparsekern.ops.obs_quantize import problem


def swept(weight, factor, mask, scales):
    """The sweep by its textbook form in float64, one row and column at a time, with the inverse of the damped Gram matrix."""
    inverse = torch.linalg.inv(factor.double() @ factor.double().T)
    rest = weight.double().clone()
    found, errors = torch.zeros_like(rest), torch.zeros(len(rest), dtype=torch.float64)
    for j in range(rest.shape[1]):
        for row in range(len(rest)):
            scale = float(scales[row, j // COLUMNS])
            if mask[row, j] and scale:
                found[row, j] = scale * max(-8, min(7, round(float(rest[row, j]) / scale)))
        change = (rest[:, j] - found[:, j]) / inverse[j, j]
        errors += (rest[:, j] - found[:, j]) ** 2 / inverse[j, j]
        rest -= change[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1.0
    return found, errors


def test_is_the_textbook_sweep(isa, poisoned, generator):
    for rows, columns in ((1, 1), (3, 20), (17, 72), (18, 150)):
        weight, hessian, mask, scales = problem(rows, columns, generator)
        scales[0, 0] = 0 if rows > 1 else scales[0, 0]
        factor = reverse_cholesky(hessian, damping=0.0)
        found, error = obs_quantize(weight, factor, mask, scales)
        expected, errors = swept(weight, factor, mask, scales)
        assert (found == expected).float().mean() > 0.999  # float32 may round a few ties otherwise
        torch.testing.assert_close(error.double(), errors, rtol=1e-3, atol=1e-5)
        change = (found - weight).double()
        torch.testing.assert_close(error.double(), ((change @ hessian.double()) * change).sum(1), rtol=1e-3, atol=1e-4)


def test_every_weight_is_on_its_grid(isa, generator):
    weight, hessian, mask, scales = problem(21, 200, generator)
    found, _ = obs_quantize(weight, reverse_cholesky(hessian, damping=0.01), mask, scales)
    codes = found.double() / scales.double().repeat_interleave(COLUMNS, 1)[:, :200]
    assert torch.equal(codes, codes.round()) and codes.min() >= -8 and codes.max() <= 7
    assert (found[~mask] == 0).all() and not ((found == 0) & found.signbit()).any()


def test_fine_scales_leave_the_sweep_of_obs_sweep(isa, generator):
    weight, hessian, mask, _ = problem(9, 80, generator)
    factor = reverse_cholesky(hessian, damping=0.0)
    plain, _, error = obs_sweep(weight, factor, mask=mask)
    _, coarse = obs_quantize(weight, factor, mask, torch.full((9, 2), 0.5).half())
    _, fine = obs_quantize(weight, factor, mask, (plain.abs().amax(1, keepdim=True) / 7).half().expand(9, 2).contiguous())
    assert error.sum() < fine.sum() < coarse.sum() and fine.sum() < 1.1 * error.sum()


def test_dead_features_are_pruned(isa, generator):
    weight, hessian, mask, scales = problem(5, 40, generator)
    hessian[7], hessian[:, 7] = 0, 0
    found, error = obs_quantize(weight, reverse_cholesky(hessian, damping=0.01), mask, scales)
    assert (found[:, 7] == 0).all() and error.isfinite().all()


def test_arguments_are_refused(generator):
    weight, hessian, mask, scales = problem(5, 72, generator)
    sound = {"weight": weight, "factor": reverse_cholesky(hessian, damping=0.0), "mask": mask, "scales": scales}
    spoiled = weight.clone()
    spoiled[2, 9] = torch.nan
    for changed, message in (
        ({"weight": weight.half()}, "weight: expected dtype float32, got float16"),
        ({"factor": torch.eye(70)}, r"factor: expected shape \(72, 72\), got \(70, 70\)"),
        ({"factor": torch.zeros(72, 70)}, "factor: expected a square matrix"),
        ({"mask": mask.int()}, "mask: expected dtype bool, got int32"),
        ({"scales": scales[:, :1]}, r"scales: expected shape \(5, 2\), got \(5, 1\)"),
        ({"scales": scales.float()}, "scales: expected dtype float16, got float32"),
        ({"scales": scales * torch.inf}, r"scales: expected finite values, got inf at \[0, 0\]"),
        ({"weight": spoiled}, r"weight: expected finite values, got nan at \[2, 9\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            obs_quantize(**(sound | changed))
