"""COPAL: prune by how strongly the layer's output reacts to each weight, summed over all datasets so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from ._fields import choice, number
from .base import LinearMethod
from .selection import keep_mask
from .solution import Solution
from .statistics import GramImportance, HasImportance, SampleImportance

GRADIENTS_AT_ONCE = 1 << 24  # entries of the per-token gradients that are held together


@dataclass(frozen=True)
class COPAL(LinearMethod):
    """Prune the weights of the least importance: those that the layer's output reacts to the least.

    This is a **reconstruction**: no code is public, and the paper's formulas could be read only in part.

    * From the paper: calibration datasets come one after another and are not kept. Input and weight of a layer `y = f(x, W)` are
      perturbed. The squared norm of the output's change is differentiated with respect to the weight's perturbation. The
      importance is `|W * gradient|`, summed over samples and datasets. Each mask is chosen from the dense weights by the
      importance so far.
    * Chosen here: perturbations in proportion to `x` and `W`, since random ones have no expectation that ranks weights; the
      absolute value before or after the sum over tokens (`form`); where weights are compared (`scope`). Every block sees the
      outputs of pruned blocks, as in Wanda. Datasets are weighted by their tokens.

    For a linear layer the perturbation's size cancels. With outputs `Y = X W^T` and the Gram matrix `G = X^T X` the importance is

    * `form="sample"`: `|W| * (|Y|^T |X|)`, from the absolute value of each token's gradient `y x^T`;
    * `form="gram"`: `|W * (W G)|`, from the gradient of a whole dataset: Wanda's squared score plus the interaction of each weight
      with the others of its row.

    `sparsekern.prune` takes one dataset, `sparsekern.prune_continually` one after another.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.COPAL(form="gram"), 0.5, calibration=ids, progress=False)
        >>> report.sparsity
        0.5

    Source: Malla, Choi and Choi, COPAL: Continual Pruning in Large Language Generative Models, ICML 2024 (section 3).
    """

    name: ClassVar[str] = "copal"

    form: str = choice("sample", ("sample", "gram"), help="absolute value of each token's gradient, or of a dataset's")
    scope: str = choice(
        "row", ("row", "matrix"), help="where a sparsity is counted: in each row or over the matrix; N:M ignores it"
    )
    perturbation: float = number(
        1e-3, above=0, help="size of both perturbations in general_importance, relative to x and W; linears need none"
    )

    @property
    def needs(self) -> type[SampleImportance | GramImportance]:
        """The statistic whose importance is the one of `form`."""
        return GramImportance if self.form == "gram" else SampleImportance

    def solve(self, weight: torch.Tensor, statistics: HasImportance, pattern: Pattern) -> Solution:
        mask = keep_mask(statistics.importance, pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0))

    def general_importance(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weight: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """Return the importance of the weight of any layer, by finite differences of its output.

        With `S_x = f(x + dx, W) - f(x, W)` and `S_W = f(x, W + dW) - f(x, W)`, each token's gradient is that of `||S_x + S_W||^2`
        with respect to `dW`, in units of `4 p`. It is taken at `dx = p x` and `dW = p W` for the perturbation `p`. For a linear
        layer the result is the statistic's importance for every `p`, up to rounding, which is negligible in float64.

        Args:
            function: the layer `f(x, weight)`, which maps `[tokens, in_features]` to `[tokens, ...]`. Each token must be
                independent of the others, and `torch.func` must be able to differentiate it.
            weight: the layer's weight, of any shape.
            x: inputs `[tokens, in_features]`.

        Returns:
            A tensor of the shape of `weight`.
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
