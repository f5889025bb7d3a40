"""Training by several processes: each runs the batches of its own leaves, and sums are added in the fixed tree of all leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ...ranks import World
from ...ranks.sums import total_of_leaves


@dataclass(frozen=True)
class Together:
    """The processes that train a block, or a model. Each has all of its weights and takes every step, so that they stay equal.

    Attributes:
        world: the processes.
        leaves: the number of parts of each sum, which the number of processes divides.
    """

    world: World = field(default_factory=World)
    leaves: int = 1

    def total(self, leaves: Iterable[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Return sums over all leaves of all processes. All processes call this.

        Args:
            leaves: the addends of each leaf of this process, tensors of the same shapes, which may be changed.
        """
        return total_of_leaves(self.world, leaves, _added, lambda found: [(tensor, False) for tensor in found])

    def of_all_leaves(self, own: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the numbers of all leaves of all processes; `own` has those of each leaf of this process."""
        return [numbers for found in self.world.gather("leaves", [list(leaf) for leaf in own]) for numbers in found]

    def own_of(self, leaves: Sequence[list[int]]) -> list[list[int]]:
        """Return what belongs to the leaves of this process."""
        count = self.leaves // self.world.size
        return list(leaves[self.world.rank * count : (self.world.rank + 1) * count])


def gradients_of(parameters: Sequence[nn.Parameter], backward: Callable[[], float]) -> list[torch.Tensor]:
    """Return the gradients of one leaf, and its loss, `[]` float64. The parameters are left without gradients.

    Args:
        parameters: what is trained.
        backward: adds the gradients of the leaf to those of the parameters, and returns its loss.
    """
    total = backward()
    found = [torch.zeros_like(own) if own.grad is None else own.grad for own in parameters]
    for own in parameters:
        own.grad = None
    return [*found, torch.tensor(total, dtype=torch.float64)]


def _added(earlier: list[torch.Tensor], later: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one.add_(other) for one, other in zip(earlier, later, strict=True)]
