"""K-prune: remove the heads and neurons of an encoder that its outputs and hidden states depend on the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ._fields import choice, flag, number
from .base import RemovalMethod

OBJECTIVES = ("auto", "kl", "mse", "cosine", "embedding")


@dataclass(frozen=True)
class KPrune(RemovalMethod):
    """Remove attention heads and FFN neurons of an encoder, without retraining, until a share of its FLOPs or parameters is gone.

    The sub-layers are cut one after another, attention before FFN, bottom to top. For each sub-layer, all units not yet decided
    are scored on the current model, and the threshold that meets the budget is found. It cuts only the current sub-layer, whose
    output projection is then fitted to the output of the dense model. A unit's score is its knowledge over its cost, `(lam_pred
    K_pred + lam_rep K_rep) / cost`, and `mu` times that for heads:

    * predictive knowledge `K_pred`: half the squared gradient of the objective with respect to a mask on the unit's features,
      sample by sample. It does not depend on the batches; the public code squares the mean gradient of a batch.
    * representational knowledge `K_rep`: the unit's contribution to its sub-layer's output, see `ops.head_neuron_scores`.

    Before the first cut, student and teacher agree and the gradient of the objective is zero. The second-order term replaces it
    there, and everywhere with `curvature="fisher"`: the squared Jacobian in the metric of the objective, estimated with one
    random probe a sample. For KL that is the Fisher information.

    The budget counts heads and neurons only, since embeddings, LayerNorms and classifiers cannot be removed. Its FLOPs are the
    mean over the calibration samples with their own lengths. The fit of the output projections is damped towards the dense
    weights, so directions that the calibration tokens do not determine keep their values. With `tune_bias`, which the paper does
    not have, the fit compensates for the mean of the removed features.

    The objective `"kl"` compares softmaxes over the classes, `"mse"` the logits (regression), `"cosine"` the directions of the
    mean-pooled last hidden states, `"embedding"` these states with their lengths. `"auto"` is KL for a classifier, MSE for a
    regression or several labels, cosine for a model without a head.

    Example:
        >>> report = sparsekern.prune(encoder, sparsekern.KPrune(remove=0.5), calibration=ids, progress=False)
        >>> report.flops_removed >= 0.5
        True

    Source: Park, Choi and Kang, Accurate retraining-free pruning for pretrained encoder-based language models (K-prune), 2024:
    equations 4 and 5 (knowledge), algorithm 1 (search), equations 10 and 11 (tuning).
    """

    name: ClassVar[str] = "kprune"

    remove: float = number(0.5, at_least=0, below=1, help="share of the budget to remove, such as 0.5 for half of the FLOPs")
    budget: str = choice(
        "flops", ("flops", "parameters"), help="quantity that remove is a share of; both count heads and neurons only"
    )
    temperature: float = number(2.0, above=0, help="temperature of the softmaxes whose KL divergence is taken (paper: 2)")
    lam_pred: float = number(1.0, at_least=0, help="weight of the predictive knowledge (paper: 1)")
    lam_rep: float = number(2.5e-4, at_least=0, help="weight of the representational knowledge (paper: 2.5e-4)")
    mu: float = number(64.0, above=0, help="factor of a head's score over a neuron's (paper: 64, the channels of its heads)")
    tuning: bool = flag(True, help="fit the output projections to the dense model (paper: on)")
    ridge: float = number(1e-3, at_least=0, help="damping of that fit, as a share of the mean diagonal of the Gram matrix")
    tune_bias: bool = flag(True, help="fit the bias along with the weights (paper: off)")
    objective: str = choice("auto", OBJECTIVES, help="comparison of student and teacher; auto follows the model's head")
    curvature: str = choice(
        "gradient", ("gradient", "fisher"), help="order of the predictive knowledge: squared gradient (paper) or Fisher information"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam_pred and not self.lam_rep:
            raise ValueError("KPrune.lam_pred, KPrune.lam_rep: expected one of them to be above 0, got 0 and 0")

    def scores(self, predictive: torch.Tensor, representational: torch.Tensor, cost: float, heads: bool) -> torch.Tensor:
        """Return the score of each unit of a sub-layer, its knowledge divided by its cost.

        Args:
            predictive: `K_pred` of each unit, `[units]`.
            representational: `K_rep` of each unit, `[units]`.
            cost: of one unit.
            heads: True if the units are heads.

        Returns:
            `[units]` float64.
        """
        knowledge = self.lam_pred * predictive.double() + self.lam_rep * representational.double()
        return knowledge * ((self.mu if heads else 1.0) / cost)


def predictive_knowledge(features: torch.Tensor, gradient: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return `K_pred` of a batch, summed over its samples: half the squared gradient with respect to the features' masks.

    The mask of a feature multiplies it at every token, so its gradient is the sum over tokens of feature times gradient. A head's
    value is the mean over its channels.

    Args:
        features: `[samples, length, features]`, the inputs of an output projection.
        gradient: the objective's gradient with respect to `features`, of the same shape.
        head_size: channels of a head; 1 for neurons.

    Returns:
        `[features // head_size]` float64.
    """
    by_mask = (features.detach() * gradient).sum(1, dtype=torch.float32)
    return by_mask.double().square().sum(0).div_(2).unflatten(0, (-1, head_size)).mean(1)


def search(scores: Sequence[torch.Tensor], costs: Sequence[float], remaining: float) -> list[torch.Tensor]:
    """Choose the units to keep so that they cost at most `remaining`: the lowest scores are removed first.

    Args:
        scores: the units' scores, for each undecided sub-layer.
        costs: the cost of one unit, for each undecided sub-layer.
        remaining: the budget of all undecided sub-layers together.

    Returns:
        A bool mask for each sub-layer, True where kept. No kept unit has a lower score than a removed one. Among equal scores the
        earlier sub-layer and the lower index are removed first, and no more units are removed than must be.

    Raises:
        ValueError: a score is NaN.
    """
    flat = torch.cat([s.double().cpu() for s in scores])
    if flat.isnan().any():
        raise ValueError("scores: expected no NaN")
    cost = torch.cat([torch.full((len(s),), float(c), dtype=torch.float64) for s, c in zip(scores, costs, strict=True)])
    order = flat.argsort(stable=True)
    kept_cost = torch.cat([cost[order].flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    fits = kept_cost <= remaining * (1 + 1e-12)  # a share of 0 removes nothing, whatever the rounding of the sum
    removed = order[: int(fits.int().argmax())] if fits.any() else order
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[removed] = False
    return list(keep.split([len(s) for s in scores]))


def tuned_projection(
    weight: torch.Tensor, bias: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output projection closest to the targets, `min_D |A D^T - R|^2 + shift |D|^2`, added to the current one.

    Args:
        weight: `[out_features, kept]`, the projection after the cut.
        bias: `[out_features]`.
        gram: `A^T A` float32, lower triangle, of the kept features `A`, which end with a column of ones if the bias is fitted too.
        cross: `R^T A` float32, where `R` is the dense output minus that of the current projection.
        ridge: `shift` as a share of the mean diagonal of `gram`.

    Returns:
        Weight and bias, in their dtypes.
    """
    change = ops.gram_solve(gram, cross, ridge)
    kept = weight.shape[1]
    new_bias = bias if gram.shape[0] == kept else (bias.float() + change[:, kept]).to(bias.dtype)
    return (weight.float() + change[:, :kept]).to(weight.dtype), new_bias
