"""Targets that undo the error of what is pruned already: the outputs of the dense model, for the inputs that the pruned one makes.

A linear with weight `W` sees inputs `X` in the pruned model, and saw `X + dX` in the dense one. Where it writes to the residual stream,
that stream lacks `dR`. The weight `W + M^T (G + shift I)^-1` comes closest to the dense outputs, with `G = X^T X` and
`M = X^T (dX W^T + dR)`. Pruning it against `G` is the layer-wise problem of any method, with another weight.

A few tokens do not determine this weight well. So only shares of the two corrections are taken. The damping and the shares that leave
the least error on held-out tokens are chosen for each linear.

Source: Qronos (Zhang et al., 2025) and GPTAQ (Li et al., 2025) for quantisation; the choice by held-out tokens is this library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import ops
from .statistics import Gram

DAMPINGS = (0.01, 0.03, 0.1, 0.3)  # shares of the Gram matrix's mean diagonal


class Correction(NamedTuple):
    """The target of one linear.

    Attributes:
        weight: the weight to prune in place of the dense one, of the same shape and dtype. It is zero where that one is.
        inputs: the share that is taken of the correction for the inputs.
        residual: the same for the residual stream.
        damping: the damping of both.
    """

    weight: torch.Tensor
    inputs: float
    residual: float
    damping: float


@dataclass
class Drift:
    """Sums over tokens of a linear's inputs `x` in the pruned model, and of what they lack of those in the dense model.

    Attributes:
        gram: the Gram matrix of `x`.
        inputs: `[in_features, in_features]` float32, the sum of `x^T dx`.
        residual: `[in_features, out_features]` float32, the sum of `x^T dr`; None where the linear writes to no residual stream.
    """

    gram: Gram
    inputs: torch.Tensor
    residual: torch.Tensor | None = None

    @classmethod
    def zeros(cls, features: int, device: torch.device, outputs: int | None = None) -> Drift:
        """Return sums over no tokens.

        Args:
            features: input features of the linear.
            device: where the sums are.
            outputs: width of the residual stream; None for a linear that writes to none.
        """
        residual = None if outputs is None else torch.zeros(features, outputs, dtype=torch.float32, device=device)
        return cls(Gram(features, device), torch.zeros(features, features, dtype=torch.float32, device=device), residual)

    def add_drift(
        self, x: torch.Tensor, dense: torch.Tensor, row_mask: torch.Tensor | None, lack: torch.Tensor | None = None
    ) -> None:
        """Add tokens that `gram` has.

        Args:
            x: `[tokens, in_features]`, inputs in the pruned model.
            dense: the same in the dense model.
            row_mask: True at the rows to use; None uses all.
            lack: `[tokens, out_features]`, the dense residual stream minus the pruned one; None where there is none.

        Raises:
            ValueError: NaN or Inf in a row that is used.
        """
        ops.cross_gram_(self.inputs, x, dense - x, row_mask=row_mask)
        if self.residual is not None and lack is not None:
            ops.cross_gram_(self.residual, x, lack.to(x.dtype), row_mask=row_mask)

    def plus(self, other: Drift) -> Drift:
        """Return the sums over the tokens of both."""
        gram = self.gram.clone()
        gram.include(other.gram.total)
        gram.tokens += other.gram.tokens
        residual = None if self.residual is None or other.residual is None else self.residual + other.residual
        return Drift(gram, self.inputs + other.inputs, residual)

    def steps(self, weight: torch.Tensor, damping: float) -> list[torch.Tensor]:
        """Return the changes of `weight` that undo the drift of the inputs and, where there is one, of the residual stream."""
        wanted = [weight.float() @ self.inputs.T, *([] if self.residual is None else [self.residual.T])]
        return [self.gram.solve(cross, damping) for cross in wanted]

    def missing(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `M^T`, `[out_features, in_features]`: the products of `x` and what the outputs lack."""
        missing = weight.float() @ self.inputs.T
        return missing if self.residual is None else missing + self.residual.T


class _Choice(NamedTuple):
    loss: float
    damping: float
    shares: list[float]


def corrected(weights: Sequence[torch.Tensor], fitted: Drift, held_out: Drift) -> list[Correction]:
    """Return the targets of linears with the same inputs.

    Args:
        weights: dense weights, `[out_features, in_features]` each.
        fitted: the drift over the tokens that dampings and shares are not judged on.
        held_out: the drift over those that they are.
    """
    judge = ops.gram_symmetrize_(held_out.gram.gram.clone())
    missing = [held_out.missing(weight) for weight in weights]
    best = [_Choice(0.0, DAMPINGS[0], [0.0, 0.0]) for _ in weights]
    for damping in DAMPINGS:
        for place, weight in enumerate(weights):
            loss, shares = best_shares(fitted.steps(weight, damping), judge, missing[place])
            if loss < best[place].loss:
                best[place] = _Choice(loss, damping, shares)
    whole = fitted.plus(held_out)
    found: list[Correction | None] = [None] * len(weights)
    for damping in DAMPINGS:  # one factor serves all weights of a damping
        for place, weight in enumerate(weights):
            if best[place].damping == damping:
                found[place] = _correction(weight, whole, best[place])
    return [correction for correction in found if correction is not None]


def best_shares(steps: Sequence[torch.Tensor], judge: torch.Tensor, missing: torch.Tensor) -> tuple[float, list[float]]:
    """Return the shares from 0 to 1 of one or two steps that lower the squared error most, and how they change it.

    The error changes by `tr(D G D^T) - 2 tr(D M)` with the sum `D` of the steps, each scaled by its share.

    Args:
        steps: changes of a weight, `[out_features, in_features]` each.
        judge: `G`, the full Gram matrix.
        missing: `M^T`, see `Drift.missing`.
    """
    curve = [[_inner(one @ judge, other) for other in steps] for one in steps]
    slope = [_inner(step, missing) for step in steps]

    def change(shares: Sequence[float]) -> float:
        squares = sum(a * b * curve[i][j] for i, a in enumerate(shares) for j, b in enumerate(shares))
        return squares - 2 * sum(a * own for a, own in zip(shares, slope, strict=True))

    found = min(_candidates(curve, slope), key=change)
    return change(found), found


def _candidates(curve: list[list[float]], slope: list[float]) -> list[list[float]]:
    """Return points of the unit interval or square, among them the minimum there of a convex quadratic."""
    if len(slope) == 1:
        return [[0.0], [_clamped(slope[0], curve[0][0])]]
    (a, b), (_, d) = curve
    points = [[0.0, 0.0]]
    for fixed in (0.0, 1.0):  # the minima on the sides
        points += [[fixed, _clamped(slope[1] - b * fixed, d)], [_clamped(slope[0] - b * fixed, a), fixed]]
    determinant = a * d - b * b
    if determinant > 1e-9 * a * d:
        inside = [(slope[0] * d - slope[1] * b) / determinant, (slope[1] * a - slope[0] * b) / determinant]
        points += [inside] if all(0 <= share <= 1 for share in inside) else []
    return points


def _clamped(slope: float, curve: float) -> float:
    return min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _correction(weight: torch.Tensor, whole: Drift, choice: _Choice) -> Correction:
    target = weight.float()
    if any(choice.shares):
        steps = whole.steps(weight, choice.damping)
        target = sum((share * step for share, step in zip(choice.shares, steps, strict=False)), target)
        target = target.masked_fill(weight == 0, 0)
    inputs, residual = (*choice.shares, 0.0)[:2]
    return Correction(target.to(weight.dtype), inputs, residual, choice.damping)
