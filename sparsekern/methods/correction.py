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
        gain: what they take away of the squared error of the held-out outputs, relative to these outputs.
    """

    weight: torch.Tensor
    inputs: float
    residual: float
    damping: float
    gain: float

    def shares(self) -> dict[str, float]:
        """Return all but the weight, by name."""
        return {"inputs": self.inputs, "residual": self.residual, "damping": self.damping, "gain": self.gain}


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

    def include(self, other: Drift) -> None:
        """Add the sums over other tokens."""
        self.gram.include(other.gram.total)
        self.gram.tokens += other.gram.tokens
        self.inputs += other.inputs
        if self.residual is not None and other.residual is not None:
            self.residual += other.residual

    def plus(self, other: Drift) -> Drift:
        """Return the sums over the tokens of both."""
        found = Drift(self.gram.clone(), self.inputs.clone(), None if self.residual is None else self.residual.clone())
        found.include(other)
        return found

    def steps(self, weight: torch.Tensor, damping: float) -> list[torch.Tensor]:
        """Return the changes of `weight` that undo the drift of the inputs and, where there is one, of the residual stream."""
        wanted = [weight.float() @ self.inputs.T, *([] if self.residual is None else [self.residual.T])]
        return [self.gram.solve(cross, damping) for cross in wanted]

    def missing(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `M^T`, `[out_features, in_features]`: the products of `x` and what the outputs lack."""
        missing = weight.float() @ self.inputs.T
        return missing if self.residual is None else missing + self.residual.T


class Choice(NamedTuple):
    """How far to correct one linear.

    Attributes:
        loss: how much the squared error of the held-out outputs changes.
        damping: the damping.
        shares: the share of the correction for the inputs, and where there is one that for the residual stream.
    """

    loss: float
    damping: float
    shares: list[float]


def choices(
    weights: Sequence[torch.Tensor], fitted: Drift, held_out: Drift, dampings: Sequence[float] = DAMPINGS
) -> list[list[Choice]]:
    """Return for each damping, and each of some linears with the same inputs, the best shares.

    Args:
        weights: dense weights, `[out_features, in_features]` each.
        fitted: the drift over the tokens that dampings and shares are not judged on.
        held_out: the drift over those that they are.
        dampings: the dampings to try.
    """
    if not dampings:
        return []
    judge = ops.gram_symmetrize_(held_out.gram.gram.clone())
    missing = [held_out.missing(weight) for weight in weights]
    return [
        [_choice(damping, fitted.steps(weight, damping), judge, own) for weight, own in zip(weights, missing, strict=True)]
        for damping in dampings
    ]


def best_choice(found: Sequence[Choice]) -> Choice:
    """Return the choice with the smallest loss, the first of several; one that corrects nothing unless a loss is below zero."""
    best = Choice(0.0, DAMPINGS[0], [0.0, 0.0])
    for choice in found:
        if choice.loss < best.loss:
            best = choice
    return best


def targets(weights: Sequence[torch.Tensor], whole: Drift, held_out: Drift, chosen: Sequence[Choice]) -> list[Correction]:
    """Return the targets of linears with the same inputs.

    Args:
        weights: dense weights, `[out_features, in_features]` each.
        whole: the drift over all tokens.
        held_out: the drift over those that the choice was judged on.
        chosen: how far to correct each linear.
    """
    found: dict[int, Correction] = {}
    for place in sorted(range(len(weights)), key=lambda place: chosen[place].damping):  # one factor serves all weights of a damping
        found[place] = _correction(weights[place], whole, held_out, chosen[place])
    return [found[place] for place in range(len(weights))]


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


def _choice(damping: float, steps: Sequence[torch.Tensor], judge: torch.Tensor, missing: torch.Tensor) -> Choice:
    loss, shares = best_shares(steps, judge, missing)
    return Choice(loss, damping, shares)


def _correction(weight: torch.Tensor, whole: Drift, held_out: Drift, choice: Choice) -> Correction:
    target, gain = weight.float(), 0.0
    if any(choice.shares):
        energy = _inner(target @ ops.gram_symmetrize_(held_out.gram.gram.clone()), target)
        gain = -choice.loss / energy if energy > 0 else 0.0
        steps = whole.steps(weight, choice.damping)
        target = sum((share * step for share, step in zip(choice.shares, steps, strict=False)), target)
        target = target.masked_fill(weight == 0, 0)
    inputs, residual = (*choice.shares, 0.0)[:2]
    return Correction(target.to(weight.dtype), inputs, residual, choice.damping, gain)
