"""AdamW over parameters of which some weights are pruned, by the op `masked_adamw_`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops
from ..models import Linear
from .grid import Grid

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER, SCALES = "master", "scales"  # kinds of state of parameters on a grid


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter to train.

    Attributes:
        name: its name in the model.
        parameter: the parameter, float32.
        mask: True where a weight is kept, in the layout of the parameter; None keeps all.
        grid: the grid that the parameter stays on; None for any value.
    """

    name: str
    parameter: nn.Parameter
    mask: torch.Tensor | None = None
    grid: Grid | None = None


class MaskedAdamW:
    """AdamW whose pruned weights stay exactly zero.

    Of a parameter on a grid it moves a float32 master, and rounds it after each step; see `Grid`.

    Attributes:
        trained: the parameters.
        steps: the steps that were taken.
    """

    def __init__(
        self, trained: Iterable[Trained], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        """Begin with moments of zero. `weight_decay` is that of matrices; norms and biases do not decay."""
        self.trained = tuple(trained)
        self.steps = 0
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._moments = {
            f"{moment}/{of.name}": torch.zeros_like(of.parameter, dtype=torch.float32) for of in self.trained for moment in MOMENTS
        }
        self._masters = {of.name: of.parameter.detach().clone() for of in self.trained if of.grid is not None}

    def step(self, lr: float, clip: float | None = None) -> float:
        """Take a step along the gradients that the parameters hold, and drop these.

        Args:
            lr: the learning rate.
            clip: the largest norm of the gradient of all kept weights together; None clips nothing.

        Returns:
            That norm, in front of clipping; NaN where a gradient is not finite. Then nothing is changed.
        """
        held = [of for of in self.trained if of.parameter.grad is not None]
        norm = _masked_norm(held)
        if not norm < float("inf"):
            return float("nan")
        self.steps += 1
        scale = 1.0 if clip is None or norm <= clip else clip / norm
        with torch.no_grad():
            for of in held:
                weight = self._masters.get(of.name, of.parameter)
                ops.masked_adamw_(
                    weight,
                    _gradient(of),
                    *(self._moments[f"{moment}/{of.name}"] for moment in MOMENTS),
                    step=self.steps,
                    lr=lr,
                    mask=of.mask,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    eps=self._eps,
                    weight_decay=self._weight_decay if of.parameter.dim() > 1 else 0.0,
                    grad_scale=scale,
                )
                of.parameter.grad = None
                if of.grid is not None:
                    of.grid.round_(of.parameter, weight)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Return the moments, by `exp_avg/NAME` and `exp_avg_sq/NAME`, and of parameters on a grid `master/NAME` and `scales/NAME`.

        The number of steps is the caller's to keep.
        """
        masters = {f"{MASTER}/{name}": master for name, master in self._masters.items()}
        scales = {f"{SCALES}/{of.name}": of.grid.scales for of in self.trained if of.grid is not None}
        return {**self._moments, **masters, **scales}

    def restore(self, moments: Mapping[str, torch.Tensor], steps: int) -> None:
        """Take what `state` returned after `steps` steps.

        Raises:
            ValueError: a tensor is missing, or of another shape.
        """
        for name, own in self.state().items():
            if name not in moments or moments[name].shape != own.shape:
                raise ValueError(f"moments: expected {name} of shape {tuple(own.shape)}")
        for name, own in self.state().items():
            own.copy_(moments[name])
        for of in self.trained:
            if of.grid is not None:
                of.grid.scales = moments[f"{SCALES}/{of.name}"].to(of.parameter.device)
        self.steps = steps


def _masked_norm(held: Sequence[Trained]) -> float:
    """Set the gradients of pruned weights to zero, and return the norm of what is left."""
    for of in held:
        if of.mask is not None:
            _gradient(of).mul_(of.mask)  # eight times as fast as `masked_fill_` on a CPU, but NaN and Inf stay
    norm = _norm(held)
    if math.isfinite(norm):
        return norm
    for of in held:
        if of.mask is not None:
            _gradient(of).masked_fill_(~of.mask, 0)
    return _norm(held)


def _norm(held: Iterable[Trained]) -> float:
    squares = [torch.linalg.vector_norm(_gradient(of), dtype=torch.float32) for of in held]
    return float(torch.linalg.vector_norm(torch.stack(squares))) if squares else 0.0


def _gradient(of: Trained) -> torch.Tensor:
    assert of.parameter.grad is not None
    return of.parameter.grad


def kept_weights(linears: Iterable[Linear]) -> dict[nn.Parameter, torch.Tensor]:
    """Return the mask of each parameter that stores pruned linears: True where a weight is not zero, or not of these linears."""
    masks: dict[nn.Parameter, torch.Tensor] = {}
    for linear in linears:
        if linear.parameter not in masks:
            masks[linear.parameter] = torch.ones_like(linear.parameter, dtype=torch.bool)
        linear.part_of(masks[linear.parameter]).copy_(linear.part_of(linear.parameter.detach()) != 0)
    return masks
