from __future__ import annotations

import math

import pytest
import torch

from sparsekern.ops import masked_adamw_
from sparsekern.ops.masked_adamw import reference

SHAPES = [(), (1,), (7,), (513,), (3, 1030), (2, 3, 5), (0, 4)]


def state(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weight, grad, mean, anchor = (torch.randn(shape, generator=generator) for _ in range(4))
    variance = mean**2 + torch.rand(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.5
    return {
        "weight": weight, "grad": grad.to(dtype), "exp_avg": mean, "exp_avg_sq": variance, "mask": mask, "anchor": anchor,
    }  # fmt: skip


def step_in_float64(given: dict, *, step, lr, beta1, beta2, eps, weight_decay, grad_scale, pull) -> list[torch.Tensor]:
    """The formulas of the paper, one element at a time."""
    columns = {name: value.double().reshape(-1).tolist() for name, value in given.items()}
    found: list[list[float]] = [[], [], []]
    for w, g, m, v, kept, anchor in zip(*columns.values(), strict=True):
        g = grad_scale * g + pull * (w - anchor)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        new = w - lr * weight_decay * w - lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps)
        for values, value in zip(found, (new, m, v), strict=True):
            values.append(value if kept else 0.0)
    return [torch.tensor(values, dtype=torch.float64).reshape(given["weight"].shape) for values in found]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_step_of_the_paper_on_kept_weights(isa, generator, shape, dtype):
    given = state(shape, generator, dtype)
    settings = dict(
        step=3, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, grad_scale=0.5, pull=0.25
    )  # fmt: skip
    expected = step_in_float64(given, **settings)
    half = torch.full(shape, 7.0, dtype=torch.bfloat16)
    weight = given.pop("weight")
    assert masked_adamw_(weight, **given, **settings, half=half) is weight
    for got, want in zip((weight, given["exp_avg"], given["exp_avg_sq"]), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
        assert (got[~given["mask"]] == 0).all() and not torch.signbit(got[~given["mask"]]).any()
    assert torch.equal(half, weight.bfloat16())


def test_equals_torch_over_several_steps(isa, generator):
    """Where every weight is kept, and where a mask is applied to what torch computes."""
    for masked in (False, True):
        given = state((40, 33), generator)
        mask = given["mask"] if masked else torch.ones(40, 33, dtype=torch.bool)
        ours = given["weight"].clone() * mask
        theirs = torch.nn.Parameter(ours.clone())
        mean, variance = torch.zeros_like(ours), torch.zeros_like(ours)
        optimizer = torch.optim.AdamW([theirs], lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
        for step in range(1, 6):
            grad = torch.randn(40, 33, generator=generator)
            masked_adamw_(
                ours,
                grad,
                mean,
                variance,
                step=step,
                lr=0.02,
                mask=mask if masked else None,
                beta1=0.8,
                beta2=0.9,
                weight_decay=0.3,
            )
            theirs.grad = grad * mask
            optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_nothing_of_a_pruned_weight_is_read(isa, generator, hidden):
    given = state((20, 48), generator)
    expected = {name: value.clone() for name, value in given.items()}
    for name in ("weight", "grad", "exp_avg", "exp_avg_sq", "anchor"):
        given[name][~given["mask"]] = hidden
    for values in (given, expected):
        masked_adamw_(**values, step=2, lr=0.1, pull=0.5)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(given[name], expected[name])


def test_the_proximal_term_alone_pulls_to_the_anchor(isa, generator):
    given = state((6, 6), generator)
    given["grad"].zero_(), given["exp_avg"].zero_(), given["exp_avg_sq"].zero_(), given["mask"].fill_(True)
    for step in range(1, 200):
        masked_adamw_(**given, step=step, lr=0.05, pull=1.0)
    torch.testing.assert_close(given["weight"], given["anchor"], rtol=0, atol=0.05)


def test_strided_tensors_are_changed_in_place(isa, generator):
    expected = state((20, 48), generator)
    moved = {name: value.mT.contiguous().mT for name, value in expected.items()}
    copies = torch.zeros(20, 48, dtype=torch.float16), torch.zeros(48, 20, dtype=torch.float16).mT
    places = {name: value.data_ptr() for name, value in moved.items()}
    for values, half in ((expected, copies[0]), (moved, copies[1])):
        masked_adamw_(**values, step=2, lr=0.1, half=half)
    for name, value in moved.items():
        assert torch.equal(value, expected[name]) and value.data_ptr() == places[name]
    assert torch.equal(*copies)


@pytest.mark.parametrize("function", [masked_adamw_, reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["grad", "weight", "anchor"])
def test_values_that_are_not_finite_are_named(isa, generator, function, bad, name):
    given = state((50, 40), generator)
    given["mask"][30, 20] = True
    given[name][30, 20] = bad
    with pytest.raises(ValueError, match=rf"{name}: expected finite values, got {bad} at \[30, 20\]"):
        function(**given, step=1, lr=0.1, pull=0.5)


def test_a_gradient_that_overflows_when_scaled_is_named(isa):
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match=r"grad: expected finite values, got inf at \[0, 1\]"):
        masked_adamw_(zero.clone(), torch.tensor([1.0, 1e30, 1.0]), zero.clone(), zero.clone(), step=1, lr=0.1, grad_scale=1e30)


F, B, H = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": H}, TypeError, "weight: expected dtype float32, got float16"),
        ({"weight": 3.0}, TypeError, "weight: expected a tensor, got float"),
        ({"grad": None}, TypeError, "grad: expected a tensor, got NoneType"),
        ({"grad": F[:1]}, ValueError, r"grad: expected shape \(2, 8\), got \(1, 8\)"),
        ({"exp_avg": H}, TypeError, "exp_avg: expected dtype float32, got float16"),
        ({"exp_avg_sq": F[0]}, ValueError, r"exp_avg_sq: expected 2 dimensions, got shape \(8,\)"),
        ({"mask": F}, TypeError, "mask: expected dtype bool, got float32"),
        ({"anchor": H}, TypeError, "anchor: expected dtype float32, got float16"),
        ({"half": F}, TypeError, "half: expected dtype bfloat16 or float16, got float32"),
        ({"step": 0}, ValueError, "step: expected at least 1, got 0"),
        ({"step": 1.5}, TypeError, "step: expected a whole number, got 1.5"),
        ({"lr": -1.0}, ValueError, "lr: expected at least 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number, got nan"),
        ({"beta1": 1.0}, ValueError, "beta1: expected a number below 1, got 1.0"),
        ({"beta2": -0.5}, ValueError, "beta2: expected at least 0, got -0.5"),
        ({"eps": math.inf}, ValueError, "eps: expected a finite number, got inf"),
        ({"weight_decay": -0.5}, ValueError, "weight_decay: expected at least 0, got -0.5"),
        ({"grad_scale": math.nan}, ValueError, "grad_scale: expected a finite number, got nan"),
        ({"pull": 0.5}, ValueError, "pull: expected 0 without an anchor, got 0.5"),
    ],
)
def test_refusals(change, error, message):
    given = {"weight": F.clone(), "grad": F, "exp_avg": F.clone(), "exp_avg_sq": F.clone(), "step": 1, "lr": 0.1}
    with pytest.raises(error, match=message):
        masked_adamw_(**(given | change))
