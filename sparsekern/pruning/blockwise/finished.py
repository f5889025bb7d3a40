"""What a run takes from its checkpoint, and how it waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile

from ..progress import Clock
from ..run import Blocks


def finished_blocks(checkpoint: Blocks | None, order: Sequence[int]) -> set[int]:
    """Return the blocks to restore: those in front of the first one that is not finished.

    Those behind it are pruned again, since their inputs may change. A streamed model reads them as they were in front of the run.

    Args:
        checkpoint: the finished blocks; None for none.
        order: the blocks to prune, in their order.
    """
    if checkpoint is None:
        return set()
    found = set(takewhile(checkpoint.holds, order))
    for index in order:
        if index not in found and checkpoint.holds(index):
            checkpoint.put_back(index)
    return found


@contextmanager
def blocks_on_disk(checkpoint: Blocks | None, clock: Clock) -> Iterator[None]:
    """Wait at the end until all blocks are on disk. After an error, that of the disk is not raised."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            if checkpoint is not None:
                checkpoint.finish()
        raise
    if checkpoint is not None:
        with clock.phase("write"):
            checkpoint.finish()
