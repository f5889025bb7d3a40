"""The course of a model's forwards: the order of its blocks, and how their arguments are made again once earlier blocks are pruned."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ...models import Blocks
from ..batches import TOKENS
from .lineage import Element
from .trace import END, OUTSIDE, Run, Trace


@dataclass(frozen=True)
class Course:
    """The observations of one forward for each set of inputs that batches give.

    Attributes:
        blocks: the blocks of the model.
        traces: a trace for each set of names of inputs.
        order: the blocks to follow, in the order of their runs.
        chain: True if each block takes nothing from earlier ones but the output of the one before.
    """

    blocks: Blocks
    traces: dict[frozenset[str], Trace]
    order: tuple[int, ...]
    chain: bool

    def calls(self, index: int) -> list[str]:
        """Return the linears that block `index` calls, in order, or those outside behind the last block; empty where forwards differ."""
        name = self.blocks.block_name(index) if index < len(self.blocks.modules) else OUTSIDE
        found = [trace.calls[name] for trace in self.traces.values() if name in trace.calls]
        return found[0] if found and all(calls == found[0] for calls in found) else []

    def masks(self, linear: str, index: int) -> list[str | None]:
        """Return the names of the padding masks that the inputs of a linear of block `index` follow, call by call.

        Where forwards differ, or the linear was not called, it is the mask of the block's hidden states.
        """
        found = [trace.masks[linear] for trace in self.traces.values() if linear in trace.masks]
        if found and all(masks == found[0] for masks in found):
            return found[0]
        return [next((run.mask for trace in self.traces.values() for run in trace.runs if run.index == index), TOKENS)]

    def input_of(self, linear: str) -> Hashable:
        """Return what tells the inputs of a linear from those of others; its name where it was not called."""
        return next((trace.inputs[linear] for trace in self.traces.values() if linear in trace.inputs), linear)

    def run_of(self, index: int) -> Run:
        """Return a run of block `index`."""
        return next(run for trace in self.traces.values() for run in trace.runs if run.index == index)

    def last_use(self, element: Element) -> int:
        """Return the place in `order` of the last block that uses a tensor, or `END`; -1 where none does."""
        places = {index: place for place, index in enumerate(self.order)}
        found = [places.get(user, -1) for trace in self.traces.values() for user in trace.users.get(element, ())]
        if any(element in trace.outside for trace in self.traces.values()):
            found.append(END)
        return max(found, default=-1)

    def is_overwritten(self, element: Element) -> bool:
        """Return whether the model changes a tensor in place between the blocks."""
        return any(element in trace.overwritten for trace in self.traces.values())
