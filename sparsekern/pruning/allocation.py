"""Shares of zeros by linear, allocated before a block-wise run: each linear's error at several shares, times how much the loss minds it.

How much it minds is the mean square of the loss's gradient at each output. The loss is that of labels which the model itself draws, so
its square is the curvature of the KL divergence from the dense model. It takes one forward and one backward pass over a few thousand
tokens. The errors are those of SparseGPT on the inputs in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..methods import Gram, SparseGPT
from ..methods.allocation import FISHER, UNIFORM, Curve, allocated_zeros
from ..models import Linear
from ..pattern import Pattern, Unstructured, pruned_count, share_with_zeros
from .batches import Batch
from .blockwise.activations import Activations
from .blockwise.statistics import SharedStatistics
from .plan import Plan
from .seeds import derived_seed

REACH = 0.15  # that a share may differ from the one asked for
LEVELS = 5  # of each curve
TOKENS = 4096  # that the loss is taken of
LENGTH = 512  # of them in one forward and backward pass, whose logits and activations are all in memory


def with_allocation(model: nn.Module, plan: Plan, batches: Sequence[Batch], seed: int) -> Plan:
    """Return the plan with a share of zeros of its own for each linear whose pattern is a share. The sum of all zeros stays.

    Args:
        model: the dense model, ready to run.
        plan: the linears, their patterns, and the course of the forwards.
        batches: the calibration data.
        seed: draws the labels.

    Raises:
        ValueError: no linear of a block has a share of zeros for pattern; experts; or a model without logits.
    """
    if plan.has_experts:
        raise ValueError(
            f"allocation: expected {UNIFORM!r} for a mixture, most of whose experts a few tokens do not reach, got {FISHER!r}"
        )
    chosen = [
        linear for linears in plan.block_linears for linear in linears if isinstance(plan.patterns[linear.name], Unstructured)
    ]
    if not chosen:
        shown = ", ".join(sorted(set(map(str, plan.patterns.values()))))
        raise ValueError(f"allocation: expected {UNIFORM!r} for pattern {shown}, which is no share of zeros, got {FISHER!r}")
    squares = gradient_squares(model, chosen, batches, seed)
    curves = cost_curves(model, plan, chosen, batches, squares)
    names = [linear.name for linear in chosen]
    budget = sum(pruned_count(curves[linear.name].weights, plan.patterns[linear.name].sparsity) for linear in chosen)
    zeros = allocated_zeros([curves[name] for name in names], budget)
    shares: dict[str, Pattern] = {
        name: share_with_zeros(count, curves[name].weights) for name, count in zip(names, zeros, strict=True)
    }
    return replace(plan, patterns=plan.patterns | shares, allocation=FISHER)


def gradient_squares(model: nn.Module, linears: Sequence[Linear], batches: Sequence[Batch], seed: int) -> dict[str, torch.Tensor]:
    """Return for each linear the mean square of the loss's gradient at its outputs, `[out_features]` float64, by name.

    Args:
        model: the model, ready to run.
        linears: the linears.
        batches: the calibration data, of which the first tokens are taken.
        seed: draws the labels.

    Raises:
        ValueError: the model returns no logits of each token.
    """
    sums = {linear.name: torch.zeros(linear.shape[0], dtype=torch.float64, device=linear.weight.device) for linear in linears}
    tokens = 0
    generator = torch.Generator(device="cpu").manual_seed(derived_seed(seed, "labels"))
    with _frozen(model):
        for inputs, mask in _samples(batches):
            with torch.enable_grad(), ExitStack() as stack:
                for linear in linears:
                    for module in linear.modules:
                        stack.callback(module.register_forward_hook(_squaring(sums[linear.name])).remove)
                logits = getattr(model(**inputs, use_cache=False), "logits", None)
                if not isinstance(logits, torch.Tensor) or logits.shape[:2] != mask.shape:
                    raise ValueError(
                        f"allocation: expected a model that returns the logits of each token, got {type(model).__name__}"
                    )
                real = logits[mask].float()
                drawn = torch.multinomial(real.detach().softmax(1).cpu(), 1, generator=generator).flatten().to(real.device)
                functional.cross_entropy(real, drawn, reduction="sum").backward()
            tokens += int(mask.sum())
            if tokens >= TOKENS:
                break
    return {name: total / tokens for name, total in sums.items()}


def cost_curves(
    model: nn.Module, plan: Plan, linears: Sequence[Linear], batches: Sequence[Batch], squares: dict[str, torch.Tensor]
) -> dict[str, Curve]:
    """Return the cost of each linear at several shares of zeros, by name.

    Args:
        model: the model, ready to run.
        plan: the patterns, and the course of the forwards.
        linears: the linears of its blocks to measure.
        batches: the calibration data.
        squares: the mean squares of the gradient, by name.
    """
    course = plan.course
    assert course is not None
    solver, curves, left = SparseGPT(), {}, {linear.name for linear in linears}
    activations = Activations(model, list(batches), course)
    for index in course.order:
        own = [linear for linear in plan.block_linears[index] if linear.name in left]
        shared = SharedStatistics(own, Gram, masks={linear.name: course.masks(linear.name, index) for linear in own})
        order = [name for name in course.calls(index) if name in {linear.name for linear in own}]
        for batch, inputs, _ in activations.inputs_of(index, own, order) if own else ():
            shared.add(batch, inputs)
        for members, gram in shared.groups:
            for linear in members:
                curves[linear.name] = _curve(solver, linear, gram, plan.patterns[linear.name], squares[linear.name])
        left -= curves.keys()
        if not left:
            break
        activations.advance(index)
    return curves


def _curve(solver: SparseGPT, linear: Linear, gram: Any, pattern: Any, squares: torch.Tensor) -> Curve:
    count = linear.weight.numel()
    lowest, highest = max(pattern.sparsity - REACH, 0.0), min(pattern.sparsity + REACH, (1 + pattern.sparsity) / 2)
    shares = sorted({pattern.sparsity, *(lowest + (highest - lowest) * place / (LEVELS - 1) for place in range(LEVELS))})
    zeros, costs = [], []
    for share in shares:
        zeros.append(pruned_count(count, share))
        found = solver.solve(linear.weight, gram, Unstructured(share)).row_error
        assert found is not None
        costs.append(float((found * squares).sum()))
    return Curve(count, zeros, costs)


def _samples(batches: Sequence[Batch]) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Yield single samples, cut to `LENGTH` tokens, with the mask of their real tokens."""
    for batch in batches:
        for place in range(batch.shape[0]):
            alone = batch.part(torch.tensor([place]))
            inputs = {
                name: value[:, :LENGTH] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
                for name, value in alone.inputs.items()
            }
            main = inputs[batch.main]
            mask = torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
            yield inputs, mask if alone.token_mask is None else alone.token_mask[:, :LENGTH]


def _squaring(total: torch.Tensor) -> Callable[..., object]:
    """Return a forward hook that adds the squares of the gradient at an output, summed over tokens, to `total`."""

    def add(gradient: torch.Tensor) -> None:
        total.add_(gradient.flatten(0, -2).double().square().sum(0))

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_().clone()  # the model may change it in place
        output.register_hook(add)
        return output

    return hook


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take no gradients of parameters within."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
