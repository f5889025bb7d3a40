"""Checks of what may follow a method, in front of all work."""

from __future__ import annotations

from torch import nn

from ...methods import BlockTuning, LinearMethod, Method
from ...models.streaming import stream_of


def check_tuning(tune: BlockTuning | None, method: Method, model: nn.Module, leaves: int) -> None:
    """Raise unless the blocks of a run can be tuned in this way.

    Args:
        tune: see `sparsekern.prune`.
        method: the method that prunes the linears.
        model: the model.
        leaves: the number of parts that statistics are summed in.

    Raises:
        TypeError: `tune` is no `BlockTuning`.
        ValueError: the method leaves no masks block by block, the model is streamed, or several processes or leaves share the work.
    """
    if tune is None:
        return
    if not isinstance(tune, BlockTuning):
        raise TypeError(f"tune: expected a config such as BlockTuning(), or None, got {tune!r}")
    if not isinstance(method, LinearMethod):
        raise ValueError(f"tune: expected None for {type(method).__name__}, which leaves no masks block by block")
    if stream_of(model) is not None:
        raise ValueError("tune: expected None for a streamed model, whose dense blocks are not in memory")
    if leaves > 1:
        raise ValueError(f"tune: expected None for sums in {leaves} parts (several processes, or leaves)")
