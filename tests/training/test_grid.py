"""Training on a grid of 4-bit values: masters move, parameters are the masters rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsekern import SparsekernWarning
from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.layouts.q4_grid import grid_scales, on_refitted_grid
from sparsekern.models import Linear
from sparsekern.training.grid import grids_of
from sparsekern.training.masked_adamw import MaskedAdamW, Trained
from tests.runtime.test_four_bits import weight_of_4_bits


def refitted(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounding group by group in float64."""
    new_weight, new_scales = torch.zeros_like(weight), scales.clone()
    for row in range(len(weight)):
        for block, scale in enumerate(scales[row].double()):
            own = weight[row, block * COLUMNS : (block + 1) * COLUMNS].double()
            codes = (own / scale).round().clamp(-8, 7) if scale else torch.zeros_like(own)
            if codes.any():
                new_scales[row, block] = (own @ codes / (codes @ codes)).half()
            new_weight[row, block * COLUMNS : (block + 1) * COLUMNS] = (new_scales[row, block].double() * codes).float()
    return new_weight, new_scales


def test_scales_are_fitted_to_the_weights(generator):
    weight = weight_of_4_bits(9, 152, generator)
    weight[2, :COLUMNS] = 0
    scales = grid_scales(weight)
    moved = weight * 1.03 + 0.02 * torch.randn(9, 152, generator=generator) * (weight != 0)
    rounded, fitted = on_refitted_grid(moved, scales)
    wanted, wanted_scales = refitted(moved, scales)
    torch.testing.assert_close(fitted, wanted_scales, rtol=1e-3, atol=0)
    torch.testing.assert_close(rounded, wanted, rtol=1e-3, atol=0)
    assert fitted[2, 0] == scales[2, 0] and (rounded[weight == 0] == 0).all() and grid_scales(rounded) is not None
    assert (rounded - moved).norm() < (on_refitted_grid(weight, scales)[0] - moved).norm()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_step_moves_masters_and_rounds_them(generator, kind):
    weight = weight_of_4_bits(64, 64, generator)
    module = nn.Linear(64, 64) if kind == "linear" else Conv1D(64, 64)
    stored = weight if kind == "linear" else weight.T.contiguous()
    module.weight = nn.Parameter(stored.clone())
    grid = grids_of([Linear("a", (module,))])[module.weight]
    mask, bias = stored != 0, module.bias.detach().clone()
    optimizer = MaskedAdamW([Trained("a", module.weight, mask, grid), Trained("b", module.bias)])
    reference = stored.clone()
    moments, scales = [torch.zeros_like(reference) for _ in range(2)], grid_scales(weight)
    for step in range(1, 6):
        grad = torch.randn(64, 64, generator=generator)
        module.weight.grad, module.bias.grad = grad.clone(), torch.ones(64)
        optimizer.step(0.01)
        for moment, beta, value in zip(moments, (0.9, 0.999), (grad, grad**2), strict=True):
            moment.mul_(beta).add_((1 - beta) * value * mask)
        reference -= mask * 0.01 * (moments[0] / (1 - 0.9**step)) / ((moments[1] / (1 - 0.999**step)).sqrt() + 1e-8)
        wanted, scales = refitted(reference if kind == "linear" else reference.T, scales)
        torch.testing.assert_close(
            module.weight.detach() if kind == "linear" else module.weight.detach().T, wanted, rtol=2e-3, atol=1e-5
        )
    trained = module.weight.detach()
    assert not trained[~mask].any() and (trained - reference).abs().max() > 0.01
    assert grid_scales(trained if kind == "linear" else trained.T) is not None
    torch.testing.assert_close(module.bias.detach(), bias - 5 * 0.01)  # constant gradients move by the learning rate


def test_state_goes_on_to_the_same_bits(generator):
    start, grads = weight_of_4_bits(8, 128, generator), torch.randn(6, 8, 128, generator=generator)

    def made():
        module = nn.Linear(128, 8, bias=False)
        module.weight = nn.Parameter(start.clone())
        return module, MaskedAdamW([Trained("a", module.weight, start != 0, grids_of([Linear("a", (module,))])[module.weight])])

    module, optimizer = made()
    for number, grad in enumerate(grads):
        if number == 3:
            kept = {name: value.clone() for name, value in optimizer.state().items()}, module.weight.detach().clone()
        module.weight.grad = grad.clone()
        optimizer.step(0.02)
    again, resumed = made()
    again.weight.data.copy_(kept[1])
    resumed.restore(kept[0], 3)
    for grad in grads[3:]:
        again.weight.grad = grad.clone()
        resumed.step(0.02)
    assert torch.equal(again.weight, module.weight) and kept[0].keys() == {"exp_avg/a", "exp_avg_sq/a", "master/a", "scales/a"}
    with pytest.raises(ValueError, match=r"moments: expected scales/a of shape \(8, 2\)"):
        resumed.restore({**kept[0], "scales/a": kept[0]["scales/a"][:, :1]}, 3)


def test_weights_off_the_grid_have_none_and_are_named(generator):
    off, on = [nn.Linear(64, 8) for _ in range(2)], nn.Linear(64, 8)
    on.weight = nn.Parameter(weight_of_4_bits(8, 64, generator))
    linears = [Linear(name, (module,)) for name, module in zip("abc", (*off, on), strict=True)]
    with pytest.warns(SparsekernWarning, match="^a and 1 others: the weights are on no grid of 4-bit values, so they are trained"):
        assert list(grids_of(linears)) == [on.weight]
