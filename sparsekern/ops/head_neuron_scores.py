"""`head_neuron_scores`: the share of a sub-layer's output of each attention head or FFN neuron, for structured pruning."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_tensor, check_whole
from ._registry import define_op, sample

SCHEMA = "(Tensor sum_squares, Tensor weight, int head_size=1) -> Tensor"


def head_neuron_scores(sum_squares: torch.Tensor, weight: torch.Tensor, head_size: int = 1) -> torch.Tensor:
    """Score each unit: the energy of its features times the energy of the weights that read them.

    This is the representational knowledge of K-prune: `score_i = sum_t x_ti^2 * mean_o W_oi^2` for each input feature `i` of the output
    projection `W`, averaged over the features of each head. If the products of different features cancel out, it is the squared output
    error of removing the unit, up to a factor shared by all units of a model.

    `feature_norm_` makes the pass over the activations, batch by batch; this op reads the weight once. On a CPU PyTorch's own reduction is
    as fast as a kernel. On a CUDA device the Triton kernel of `feature_norm_` reads the weight and looks for NaN and Inf. A second kernel
    turns its sums into scores, in float64 and in a fixed order, so that every run gives the same bits.

    Args:
        sum_squares: `[features]` float32, accumulated by `feature_norm_` over the tokens.
        weight: `[out_features, features]` float32, bfloat16 or float16, of the projection that reads the features.
        head_size: consecutive features of one unit: those of a head, or 1 for neurons.

    Returns:
        `[features // head_size]` float32. Divide by the number of tokens to compare different calibration sets.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; features not divisible by `head_size`; NaN or Inf in the weight.

    Source: Park et al., Knowledge-preserving pruning (K-prune), 2024, equation 5 as estimated by its public code.
    """
    check_tensor("sum_squares", sum_squares, ndim=1, dtypes=(torch.float32,))
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, *sum_squares.shape), device=sum_squares.device)
    check_whole("head_size", head_size, 1)
    if len(sum_squares) % head_size:
        raise ValueError(f"head_size: expected a divisor of the {len(sum_squares)} features, got {head_size}")
    if len(weight) == 0:
        raise ValueError(f"weight: expected at least one output, got shape {tuple(weight.shape)}")
    return _op(sum_squares, weight, head_size)


def reference(sum_squares: torch.Tensor, weight: torch.Tensor, head_size: int = 1) -> torch.Tensor:
    check_finite("weight", weight)
    energy = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).square() / weight.shape[0]
    return (sum_squares * energy).unflatten(0, (-1, head_size)).mean(1)


def _fake(sum_squares, weight, head_size=1):
    torch._check(sum_squares.dim() == 1 and weight.dim() == 2 and sum_squares.shape[0] == weight.shape[1])
    return sum_squares.new_empty(sum_squares.shape[0] // head_size)


def _samples(generator: torch.Generator):
    for rows, features, head_size, dtype in ((5, 24, 1, torch.float32), (33, 72, 8, torch.bfloat16), (16, 64, 32, torch.float16)):
        weight = torch.randn(rows, features, generator=generator).to(dtype)
        yield sample(torch.rand(features, generator=generator), weight, head_size)


_op = define_op("head_neuron_scores", SCHEMA, reference=reference, fake=_fake, samples=_samples, native=False)
