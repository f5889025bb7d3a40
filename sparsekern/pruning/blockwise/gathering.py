"""What is recorded of a block while it runs, for the statistics of some of its linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ...models import Linear
from ...models.experts import Experts
from ..batches import Batch
from ..plan import Plan
from .activations import Activations, ExpertInputs, Inputs
from .experts import experts_in, parted
from .routed_rows import owners_of


@dataclass(frozen=True)
class Gathering:
    """The inputs of some linears of a block, or of those outside the blocks.

    Attributes:
        plan: the plan, with the course of the forwards.
        index: the block.
        linears: the linears.
    """

    plan: Plan
    index: int
    linears: Sequence[Linear]

    @cached_property
    def plain(self) -> list[Linear]:
        """The linears with modules of their own."""
        return parted(self.linears)[0]

    @cached_property
    def matrices(self) -> list[Linear]:
        """The matrices of fused experts."""
        return parted(self.linears)[1]

    @cached_property
    def experts(self) -> list[Experts]:
        """The fused experts that `matrices` belong to."""
        return experts_in(self.matrices)

    @cached_property
    def masks(self) -> dict[str, Sequence[str | None]]:
        """The padding masks of the calls of each linear of `plain` and of the modules of `experts`, by name, see `Batch.flatten`."""
        assert self.plan.course is not None
        names = [linear.name for linear in self.plain] + [found.name for found in self.experts]
        return {name: self.plan.course.masks(name, self.index) for name in names}

    @cached_property
    def recorded_masks(self) -> Mapping[str, Sequence[str | None]]:
        """The same of the tensors that are recorded: those of experts with modules of their own are without padding."""
        return self.masks | dict.fromkeys(self._routed, [None])

    @cached_property
    def _routed(self) -> dict[str, tuple[nn.Module, str | None]]:
        """For each linear of an expert with modules of its own, the module that calls it and the padding mask there."""
        names = [linear.name for linear in self.plain if linear.name in self.plan.listed]
        blocks = self.plan.blocks
        owners = owners_of([(blocks.block_name(self.index), blocks.modules[self.index])], names) if names else {}
        return {name: (owner, self.masks[name][0]) for name, owner in owners.items()}

    def inputs(self, activations: Activations) -> Iterator[tuple[Batch, Inputs, ExpertInputs]]:
        """Yield each batch with what it calls the linears and the experts with. Each batch runs as it is asked for."""
        assert self.plan.course is not None
        order = [name for name in self.plan.course.calls(self.index) if name in self.masks]
        if self.index < len(self.plan.blocks.modules):
            return activations.inputs_of(self.index, self.plain, order, self.experts, self._routed)
        return activations.inputs_outside(self.plain, order, self.experts)
