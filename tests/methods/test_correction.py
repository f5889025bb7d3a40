"""Targets from the dense model, against the formulas in float64."""

import itertools

import pytest
import torch

from sparsekern.methods.correction import DAMPINGS, Drift, best_choice, best_shares, choices, targets


def tokens(count: int = 300, features: int = 12, noise: float = 0.3, seed: int = 0):
    """Inputs of a pruned model, and those of the dense one, which a linear map and noise separate."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator) * torch.linspace(0.5, 2, features)
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(9)) * 0.2
    return x, x + x @ mixing + noise * torch.randn(count, features, generator=generator)


def drift(x, dense, lack=None, row_mask=None) -> Drift:
    sums = Drift.zeros(x.shape[1], x.device, None if lack is None else lack.shape[1])
    sums.gram.add(x, row_mask)
    sums.add_drift(x, dense, row_mask, lack)
    return sums


def damped(x: torch.Tensor, damping: float) -> torch.Tensor:
    gram = x.double().T @ x.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def exact_steps(weight, x, dense, lack, damping) -> list[torch.Tensor]:
    wanted = [weight.double() @ (dense - x).double().T @ x.double()]
    if lack is not None:
        wanted.append(lack.double().T @ x.double())
    return [torch.linalg.solve(damped(x, damping), own.T).T for own in wanted]


def error(weight, target, x, dense, lack) -> float:
    wanted = dense.double() @ weight.double().T + (0 if lack is None else lack.double())
    return float((x.double() @ target.double().T - wanted).square().sum())


def corrected(weights, fitted: Drift, held_out: Drift):
    """The targets, as a single process makes them."""
    tried = choices(weights, fitted, held_out)
    chosen = [best_choice([of_damping[place] for of_damping in tried]) for place in range(len(weights))]
    return targets(weights, fitted.plus(held_out), held_out, chosen)


@pytest.mark.parametrize("with_residual", [False, True])
def test_targets_are_the_best_of_the_grid_on_held_out_tokens(with_residual):
    (x, dense), (y, dense_y) = tokens(200), tokens(40, seed=1)
    weights = [torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    noise = [torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(len(rows))) for rows in (x, y)]
    mixing = torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    lacks = [rows @ mixing + 3 * own if with_residual else None for rows, own in zip((x, y), noise, strict=True)]
    found = corrected(weights, drift(x, dense, lacks[0]), drift(y, dense_y, lacks[1]))
    both = torch.cat((x, y)), torch.cat((dense, dense_y)), torch.cat(lacks) if with_residual else None
    for weight, own in zip(weights, found, strict=True):
        losses = {}
        for damping in DAMPINGS:
            steps = exact_steps(weight, x, dense, lacks[0], damping)
            grid = itertools.product(torch.linspace(0, 1, 21).tolist(), repeat=len(steps))
            losses[damping] = min(
                error(weight, weight + sum(a * step for a, step in zip(shares, steps, strict=True)), y, dense_y, lacks[1])
                for shares in grid
            )
        shares = [own.inputs, own.residual][: 1 + with_residual]
        steps = exact_steps(weight, x, dense, lacks[0], own.damping)
        chosen = weight.double() + sum(a * step for a, step in zip(shares, steps, strict=True))
        assert error(weight, chosen, y, dense_y, lacks[1]) <= min(losses.values()) * (1 + 1e-5)
        final = exact_steps(weight, *both, own.damping)
        expected = weight.double() + sum(a * step for a, step in zip(shares, final, strict=True))
        torch.testing.assert_close(own.weight.double(), expected, rtol=1e-3, atol=1e-4)
        energy = float((y.double() @ weight.double().T).square().sum())
        taken_away = error(weight, weight, y, dense_y, lacks[1]) - error(weight, chosen, y, dense_y, lacks[1])
        assert own.gain == pytest.approx(taken_away / energy, rel=1e-3) and own.gain > 0
        assert own.inputs > 0.5 and (own.residual > 0.2 if with_residual else own.residual == 0)


def test_noise_is_not_corrected():
    """What the dense inputs differ by has nothing to do with the inputs: few tokens fit it, held-out tokens refute it."""
    generator = torch.Generator().manual_seed(5)
    shares = []
    for _ in range(8):
        x, y = torch.randn(30, 12, generator=generator), torch.randn(200, 12, generator=generator)
        noise = [torch.randn(rows.shape, generator=generator) for rows in (x, y)]
        (own,) = corrected([torch.randn(8, 12, generator=generator)], drift(x, x + noise[0]), drift(y, y + noise[1]))
        shares.append(own.inputs)
    assert sum(shares) / len(shares) < 0.15


def test_without_drift_or_without_held_out_tokens_the_dense_weight_is_the_target():
    x, dense = tokens()
    weight = torch.randn(8, 12)
    for fitted, held_out in ((drift(x, x), drift(x, x)), (drift(x, dense), drift(x[:0], dense[:0]))):
        (own,) = corrected([weight], fitted, held_out)
        assert torch.equal(own.weight, weight) and own.inputs == own.residual == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_the_dtype_too(dtype):
    x, dense = (rows.to(dtype) for rows in tokens())
    weight = torch.randn(8, 12).to(dtype)
    weight[weight.abs() < 0.5] = 0
    (own,) = corrected([weight], drift(x, dense), drift(x, dense))
    assert own.inputs > 0.5 and own.weight.dtype == dtype
    assert torch.equal(own.weight == 0, weight == 0)


def test_features_that_were_never_active_change_nothing():
    x, dense = tokens()
    x[:, 3] = 0
    weight = torch.randn(8, 12)
    (own,) = corrected([weight], drift(x, dense), drift(x, dense))
    assert own.weight.isfinite().all() and torch.equal(own.weight[:, 3], weight[:, 3])
    assert not torch.equal(own.weight, weight)


def test_padding_is_left_out():
    x, dense = tokens(60)
    mask = torch.arange(60) % 3 > 0
    spoilt, spoilt_dense = x.clone(), dense.clone()
    spoilt[~mask], spoilt_dense[~mask] = float("nan"), float("inf")
    masked, plain = drift(spoilt, spoilt_dense, row_mask=mask), drift(x[mask], dense[mask])
    torch.testing.assert_close(masked.inputs, plain.inputs)
    assert masked.gram.tokens == plain.gram.tokens == 40


@pytest.mark.parametrize("steps", [1, 2])
def test_shares_are_the_minimum_within_the_square(steps):
    generator = torch.Generator().manual_seed(6)
    points = torch.linspace(0, 1, 41).tolist()
    for _ in range(20):
        x = torch.randn(40, 6, generator=generator)
        changes = [torch.randn(4, 6, generator=generator) for _ in range(steps)]
        wanted = torch.randn(40, 4, generator=generator) + 0.7 * x @ changes[0].T
        change, shares = best_shares(changes, x.T @ x, wanted.T @ x)

        def loss(scales, x=x, changes=changes, wanted=wanted):
            found = x @ sum(scale * own for scale, own in zip(scales, changes, strict=True)).T
            return float((found - wanted).double().square().sum())

        assert all(0 <= share <= 1 for share in shares)
        assert loss(shares) <= min(map(loss, itertools.product(points, repeat=steps))) * (1 + 1e-5)
        assert change == pytest.approx(loss(shares) - loss([0.0] * steps), rel=1e-3, abs=1e-3)
