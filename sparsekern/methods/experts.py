"""Removal of experts: the score of each expert of a mixture, and the experts that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ._fields import choice, number
from .base import ExpertMethod
from .statistics import ExpertSums

SCORES = ("reap", "man", "msan", "frequency", "activation")


@dataclass(frozen=True)
class ExpertPruning(ExpertMethod):
    """Remove whole experts of a mixture, the same number in every layer, so that an ordinary, smaller model is left.

    The scores of a layer come from the calibration tokens that its router sends to each expert, in the dense model. With the routing
    weight `g` and the expert's output `f(x)`, before the weight scales it:

    * `"reap"`: the mean of `g |f(x)|` over the tokens routed to the expert.
    * `"man"`: the mean of `|f(x)|`, `"msan"`: that of `|f(x)|^2`. Without the gate they are better where the calibration text is not
      that of the task.
    * `"frequency"`: the number of routed tokens.
    * `"activation"`: the sum of `|f(x)|`.

    The experts with the lowest scores go, and those that no token reached before all others. Where a router chooses among groups of
    experts, each group loses equally many. Shared experts stay. Router rows and correction biases of the removed experts go with them,
    so the model's own routing runs on those that are left. The weights that stay are unchanged.

    Example:
        >>> mixture = sparsekern.moefy(model, experts=6, top_k=2, calibration=ids, progress=False)
        >>> report = sparsekern.prune(mixture, sparsekern.ExpertPruning(remove=0.4), calibration=ids, progress=False)
        >>> report.experts, mixture.config.n_routed_experts
        ((5, 3), 3)

    Source: Lasby, Lazarevich, Sinnadurai, Lie, Ioannou and Thangarasa, REAP the experts, 2025 (arXiv 2510.13999). MAN and MSAN: Liu
    et al., How to score experts for one-shot MoE expert pruning, 2026 (arXiv 2606.15716).
    """

    name: ClassVar[str] = "experts"

    score: str = choice("reap", SCORES, help="score of an expert; the lowest are removed")
    remove: float = number(0.25, above=0, below=1, help="share of the experts of each layer to remove, rounded to whole experts")

    def scores(self, sums: ExpertSums) -> torch.Tensor:
        """Return the score of each expert, `[experts]` float64; zero for an expert that no token reached."""
        if self.score == "frequency":
            return sums.tokens.double()
        if self.score == "activation":
            return sums.norms.clone()
        total = {"reap": sums.weighted, "man": sums.norms, "msan": sums.squares}[self.score]
        return total / sums.tokens.clamp(min=1)
