"""Sums over all ranks whose bits do not depend on the number of ranks.

A sum has a fixed number of leaves, a power of two. Leaves are added in pairs, then the sums of pairs, and so on. A rank adds its own
leaves in this order; the rest is added in pairs of ranks, the nearest first. In each step a rank sends one half of what it holds and
adds the other, so that each entry is added once, in the order of the tree. Then the finished parts are passed back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from .world import World

PANEL = 32  # rows of a lower triangle that are packed together
T = TypeVar("T")


class TreeSum(Generic[T]):
    """The sum of leaves that come one after another. Not more than one partial sum of each height of the tree is kept."""

    def __init__(self, add: Callable[[T, T], T]) -> None:
        """Begin a sum. `add` returns the sum of an earlier and a later part, and may change the earlier one."""
        self._add = add
        self._parts: list[tuple[int, T]] = []  # with the number of leaves in each

    def put(self, leaf: T) -> None:
        """Take in the next leaf."""
        size, part = 1, leaf
        while self._parts and self._parts[-1][0] == size:
            _, earlier = self._parts.pop()
            size, part = 2 * size, self._add(earlier, part)
        self._parts.append((size, part))

    def result(self) -> T:
        """Return the sum, once the number of leaves is a power of two."""
        ((_, part),) = self._parts
        return part


def total_of_leaves(
    world: World, leaves: Iterable[T], add: Callable[[T, T], T], tensors_of: Callable[[T], Sequence[tuple[torch.Tensor, bool]]]
) -> T:
    """Return the sum of this rank's leaves and those of all others. All ranks call this.

    Args:
        world: the ranks.
        leaves: this rank's leaves in their order; their number is a power of two.
        add: see `TreeSum`.
        tensors_of: returns what a sum consists of, for `add_all_over_ranks`.
    """
    tree = TreeSum(add)
    for leaf in leaves:
        tree.put(leaf)
    found = tree.result()
    add_all_over_ranks(world, tensors_of(found))
    return found


def add_over_ranks(world: World, tensor: torch.Tensor, *, lower: bool = False) -> None:
    """Replace a tensor by its sum over all ranks, added in the order of the tree. All ranks call this for tensors of one shape.

    Args:
        world: the ranks; their number is a power of two.
        tensor: the sum over this rank's leaves.
        lower: only the lower triangle of a square matrix is added and sent.
    """
    add_all_over_ranks(world, [(tensor, lower)])


def add_all_over_ranks(world: World, tensors: Sequence[tuple[torch.Tensor, bool]]) -> None:
    """Do what `add_over_ranks` does for several tensors, each with its `lower`, with a single wait for the other ranks."""
    if world.size == 1:
        return
    world.agree("sum")  # nothing can fail between here and the last swap but the other rank
    for tensor, lower in tensors:
        _add(world, tensor, lower=lower)


def _add(world: World, tensor: torch.Tensor, *, lower: bool) -> None:
    """Replace a tensor by its sum, once all ranks are ready."""
    flat = packed_lower(tensor) if lower else tensor.reshape(-1).contiguous()
    buffer = flat.new_empty((len(flat) + 1) // 2)
    spans = [(0, len(flat))]
    step = 1
    while step < world.size:
        other = world.rank ^ step
        begin, end = spans[-1]
        middle = (begin + end) // 2
        kept, given = ((begin, middle), (middle, end)) if world.rank < other else ((middle, end), (begin, middle))
        received = buffer[: kept[1] - kept[0]]
        world.swap(flat[slice(*given)], other, received)
        flat[slice(*kept)] += received
        spans.append(kept)
        step *= 2
    while step > 1:
        step //= 2
        other = world.rank ^ step
        kept, (begin, end) = spans.pop(), spans[-1]
        taken = (kept[1], end) if kept[0] == begin else (begin, kept[0])
        world.swap(flat[slice(*kept)], other, flat[slice(*taken)])
    world.formula += bytes_of_sum(world.size, len(tensor) * (len(tensor) + 1) // 2 if lower else tensor.numel(), tensor.itemsize)
    if lower:
        unpack_lower(flat, tensor)
    else:
        tensor.copy_(flat.view(tensor.shape))


def bytes_of_sum(world_size: int, entries: int, itemsize: int = 4) -> float:
    """Return the bytes that each rank sends for the sum of a tensor: `2 (size - 1) / size` of its bytes."""
    return 2 * (world_size - 1) / world_size * entries * itemsize


def _panels(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the parts of a square matrix that cover its lower triangle: a few rows up to the diagonal."""
    for begin in range(0, len(matrix), PANEL):
        end = min(begin + PANEL, len(matrix))
        yield matrix[begin:end, :end]


def packed_lower(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of a square matrix, row by row, with a little above the diagonal."""
    return torch.cat([panel.reshape(-1) for panel in _panels(matrix)])


def unpack_lower(flat: torch.Tensor, matrix: torch.Tensor) -> None:
    """Replace the lower triangle of a square matrix by what `packed_lower` returned."""
    begin = 0
    for panel in _panels(matrix):
        panel.copy_(flat[begin : begin + panel.numel()].view(panel.shape))
        begin += panel.numel()
