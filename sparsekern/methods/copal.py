"""COPAL: a weight counts for what it says in the layer's output, on every data set met so far; pruned from the dense weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from ._fields import choice, number
from .base import HasImportance, LinearMethod, Solution
from .selection import keep_mask
from .statistics import GramImportance, SampleImportance

GRADIENTS_AT_ONCE = 1 << 24  # numbers in the per-token gradients of the general form


@dataclass(frozen=True)
class COPAL(LinearMethod):
    """Prune the weights of the least importance, which is how much the layer's output reacts to them.

    This is a **reconstruction**: no code is public, and the paper's formulas could be read only in part.

    * Established: calibration data sets come one after another and are not kept. A layer `y = f(x, W)` is perturbed in its input and
      its weight, and the squared norm of what its output does is differentiated by the weight's perturbation. The importance is
      `|W * gradient|`, added up over samples and data sets, and each mask is chosen from the dense weights by the importance so far.
    * Chosen here, where the text was not to be had: perturbations in proportion to `x` and `W` (random ones have no expectation that
      ranks weights), the absolute value before or after the sum over tokens (`form`), where weights are compared (`scope`), and
      that every block sees the outputs of pruned ones, as in Wanda. Data sets count by their tokens.

    For a linear layer the perturbation's size drops out, and with outputs `Y = X W^T` and the Gram matrix `G = X^T X` it is exactly

    * `form="sample"`: `|W| * (|Y|^T |X|)`, the absolute value of each token's own gradient `y x^T`;
    * `form="gram"`: `|W * (W G)|`, that of the gradient of a whole data set: Wanda's score squared, plus the interaction of each
      weight with the others of its row.

    With `sparsekern.prune` there is one data set; `sparsekern.prune_continually` takes one after another.

    Source: Malla, Choi and Choi, COPAL: Continual Pruning in Large Language Generative Models, ICML 2024 (section 3).
    """

    name: ClassVar[str] = "copal"

    form: str = choice("sample", ("sample", "gram"), help="absolute value of each token's gradient, or of a data set's")
    scope: str = choice(
        "row", ("row", "matrix"), help="where a sparsity is counted: in each row or over the matrix; N:M ignores it"
    )
    perturbation: float = number(
        1e-3, above=0, help="size of both perturbations, relative to x and W, in general_importance; linears do without"
    )

    @property
    def needs(self) -> type[SampleImportance | GramImportance]:
        """The statistic whose importance is that of `form`."""
        return GramImportance if self.form == "gram" else SampleImportance

    def solve(self, weight: torch.Tensor, statistics: HasImportance, pattern: Pattern) -> Solution:
        mask = keep_mask(statistics.importance, pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0), mask)

    def general_importance(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weight: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """The importance of the weight of any layer, by finite differences of its output.

        With `S_x = f(x + dx, W) - f(x, W)` and `S_W = f(x, W + dW) - f(x, W)`, each token's gradient is that of `||S_x + S_W||^2` by
        `dW`, at `dx = p x` and `dW = p W` for the perturbation `p`, and in units of `4 p`, so that for a linear layer the result is
        that of `importance` for every `p` (but for rounding, of which float64 leaves little).

        Args:
            function: the layer, `f(x, weight)`: inputs `[tokens, in_features]` and a weight to outputs `[tokens, ...]`, each token by
                itself, differentiable by `torch.func`.
            weight: of any shape.
            x: `[tokens, in_features]`.

        Returns:
            A tensor like `weight`.
        """
        change, small = weight * self.perturbation, self.perturbation

        def energy(change: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
            token = token[None]
            still = function(token, weight)
            from_input = function(token * (1 + small), weight) - still
            return (from_input + function(token, weight + change) - still).square().sum()

        gradients = torch.func.vmap(torch.func.grad(energy), in_dims=(None, 0))
        total = torch.zeros_like(weight)
        for tokens in x.split(max(1, GRADIENTS_AT_ONCE // max(1, weight.numel()))):
            each = weight * gradients(change, tokens) / (4 * small)
            total += (each.abs() if self.form == "sample" else each).sum(0)
        return total.abs_()
