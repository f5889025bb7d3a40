"""`head_neuron_scores`: how much of a sub-layer's output each attention head or FFN neuron makes, for structured pruning."""

from __future__ import annotations

import torch

from ._checks import HALF_OR_FLOAT, check_finite, check_tensor, check_whole
from ._registry import define_op, sample

SCHEMA = "(Tensor sum_squares, Tensor weight, int head_size=1) -> Tensor"


def head_neuron_scores(sum_squares: torch.Tensor, weight: torch.Tensor, head_size: int = 1) -> torch.Tensor:
    """K-prune's representational knowledge: the energy of each unit's features times that of the weights which read them.

    `score_i = sum_t x_ti^2 * mean_o W_oi^2` for each input feature `i` of the output projection `W`, averaged over the features of
    each head. It is the squared error that leaving the unit out makes in the sub-layer's output, up to a factor that all units of
    a model share, if the products of different features are taken to cancel out.

    The pass over the activations is `feature_norm_`, batch by batch as they stream by; it leaves out padding and reads each batch
    once, which is all that there is to save. What is left for this op is one read of the weight. On a CPU PyTorch's own reduction
    does that as well as a kernel would. On a CUDA device it is the Triton kernel of `feature_norm_` again, which looks for NaN and Inf
    on the way, and one more that makes scores of its sums, in float64 and in a fixed order: the same bits every time.

    Args:
        sum_squares: `[features]` float32, what `feature_norm_` has added up over the tokens.
        weight: `[out_features, features]` float32, bfloat16 or float16, of the projection that reads the features.
        head_size: consecutive features that make one unit: those of a head, or 1 for neurons.

    Returns:
        `[features // head_size]` float32. Divide by the number of tokens to compare different calibration sets.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; features not divisible by `head_size`; NaN or Inf in the weight.

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
