"""What is done within a run about the error of what is pruned already: nothing, later inputs follow it, or later targets undo it."""

from __future__ import annotations

from torch import nn

from ..methods import BlockMethod, LinearMethod, Method, check_choice
from ..methods.statistics import Importance
from ..models.streaming import stream_of

NONE, SEQUENTIAL, DENSE = "none", "sequential", "dense"
CORRECTIONS = (NONE, SEQUENTIAL, DENSE)


def check_correction(correction: str, method: Method, model: nn.Module, leaves: int) -> None:
    """Raise `ValueError` unless a run can be corrected in this way.

    Args:
        correction: see `sparsekern.prune`.
        method: the method that prunes the linears.
        model: the model.
        leaves: the number of parts that statistics are summed in.
    """
    check_choice("correction", correction, CORRECTIONS)
    if correction == NONE:
        return
    kind = type(method).__name__
    if not isinstance(method, LinearMethod) or isinstance(method, BlockMethod):
        raise ValueError(f"correction: expected {NONE!r} for {kind}, which does not solve one linear at a time, got {correction!r}")
    if method.needs is not None and issubclass(method.needs, Importance):
        raise ValueError(
            f"correction: expected {NONE!r} for {kind}, whose statistic is of a weight and its inputs together, got {correction!r}"
        )
    if leaves > 1:
        raise ValueError(
            f"correction: expected {NONE!r} for sums in {leaves} parts (several processes, or leaves), got {correction!r}"
        )
    if correction == DENSE and stream_of(model) is not None:
        raise ValueError(
            f"correction: expected {NONE!r} or {SEQUENTIAL!r} for a streamed model, whose dense blocks are not in memory, got {correction!r}"
        )
