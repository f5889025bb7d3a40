"""The targets of the linears of a stage, see `methods.correction`, computed by all processes together.

First each process tries some of the dampings for all linears. Then each makes the targets of some linears, and passes them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...methods.correction import DAMPINGS, Choice, Correction, Drift, best_choice, choices, targets
from ...models import Linear
from ...ranks import World
from ...ranks.sums import add_all_over_ranks


@dataclass
class StageSums:
    """The drift of the inputs of a stage. Without the dense model's inputs only the Gram matrix of `fitted` is filled in.

    Attributes:
        fitted: over the tokens that corrections are fitted on.
        held_out: over those that they are judged on.
        has_dense: True if the dense model's inputs are known.
    """

    fitted: Drift
    held_out: Drift
    has_dense: bool

    @classmethod
    def of(cls, linear: Linear, *, has_dense: bool, writes_residual: bool) -> StageSums:
        """Return sums over no tokens, of the inputs of a linear."""
        outputs = linear.shape[0] if writes_residual else None
        fitted, held_out = (Drift.zeros(linear.features, linear.weight.device, outputs) for _ in range(2))
        return cls(fitted, held_out, has_dense)

    def merged(self, later: StageSums) -> StageSums:
        """Return the sums over the tokens of both. Neither is used afterwards."""
        self.fitted.include(later.fitted)
        self.held_out.include(later.held_out)
        return self

    def add_over_ranks(self, world: World) -> None:
        """Replace the sums by those over the tokens of all ranks. All ranks call this."""
        if world.size == 1:
            return
        drifts = (self.fitted, self.held_out) if self.has_dense else (self.fitted,)
        counts = world.gather("tokens of a stage", [drift.gram.tokens for drift in drifts])
        sums: list[tuple[torch.Tensor, bool]] = []
        for drift, tokens in zip(drifts, zip(*counts, strict=True), strict=True):
            drift.gram.tokens = sum(tokens)
            sums.append((drift.gram.total, True))
            if self.has_dense:
                sums += [(own, False) for own in (drift.inputs, drift.residual) if own is not None]
        add_all_over_ranks(world, sums)


def dealt_targets(world: World, weights: Sequence[torch.Tensor], sums: StageSums, whole: Drift) -> list[Correction]:
    """Return the targets of linears with the same inputs. All ranks call this, and the result is the same on all.

    Args:
        world: the ranks.
        weights: dense weights, `[out_features, in_features]` each.
        sums: the drift of their inputs.
        whole: the drift over all tokens of `sums`.
    """
    tried = world.gather("shares", choices(weights, sums.fitted, sums.held_out, DAMPINGS[world.rank :: world.size]))
    by_damping = sorted((of_damping for own in tried for of_damping in own), key=lambda of_damping: Choice(*of_damping[0]).damping)
    chosen = [best_choice([Choice(*of_damping[place]) for of_damping in by_damping]) for place in range(len(weights))]
    own = slice(world.rank, None, world.size)
    made = targets(weights[own], whole, sums.held_out, chosen[own])
    if world.size == 1:
        return made
    figures = world.gather("targets", [correction[1:] for correction in made])
    found = []
    for place, weight in enumerate(weights):
        turn, owner = divmod(place, world.size)
        mine = made[turn].weight if owner == world.rank else torch.empty_like(weight)
        target = mine.contiguous()
        world.formula += target.nbytes if owner == world.rank else 0
        world.broadcast(target, owner)
        found.append(Correction(target, *figures[owner][turn]))
    return found
