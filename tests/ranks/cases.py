"""What the ranks of a pool run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

import sparsekern
from sparsekern.ranks import TreeSum, World
from sparsekern.ranks.sums import add_over_ranks


def leaf_of(number: int, shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number % 5)


def summed(rank: int, shape, leaves: int, lower: bool):
    """The sum over this world, and the bytes sent for it."""
    world = World.current()
    own = leaves // world.size
    tree = TreeSum(torch.add)
    for leaf in range(world.rank * own, (world.rank + 1) * own):
        tree.put(leaf_of(leaf, shape))
    found, before = tree.result(), world.sent
    with world.together():
        add_over_ranks(world, found, lower=lower)
    return (found.tril() if lower else found), world.sent - before


def gathered(rank: int):
    world = World.current()
    with world.together():
        values = world.gather("here", {"rank": rank})
        first = world.from_first("first", "zero" if rank == 0 else "other")
        tensor = torch.full((3,), float(rank))
        world.broadcast(tensor, 1)
    return values, first, tensor.tolist()


def failing(rank: int, where: dict):
    """Ranks fail before the exchange as `where` says: by rank, the exception."""
    world = World.current()
    with world.together():
        if rank in where:
            raise where[rank]
        world.agree("after")
        if where:
            raise AssertionError("an exchange ended although a rank had failed")


def out_of_step(rank: int):
    world = World.current()
    with world.together():
        world.agree("here" if rank else "there")


def unlike(rank: int, values):
    world = World.current()
    with world.together():
        world.check_alike(values[rank])


def perplexed(
    rank: int,
    folder: str,
    ids: torch.Tensor,
    length: int,
    stream: bool,
    nan_on: tuple[int, ...] = (),
    other_on: tuple[int, ...] = (),
):
    model = sparsekern.load(folder, stream=stream)
    ids = ids + 1 if rank in other_on else ids
    if rank in nan_on:
        model.get_input_embeddings().weight.data.fill_(float("nan"))
    return sparsekern.perplexity(model, ids, length)


def compared(rank: int, folder: str, dense: str, ids: torch.Tensor, length: int, stream: bool):
    return sparsekern.fidelity(sparsekern.load(folder, stream=stream), sparsekern.load(dense), ids, length)


def busy(rank: int, victim: int, error: BaseException, looks: bool):
    """One rank fails while the others work, which never end by themselves."""
    world = World.current()
    with caught() as found, world.together():
        if rank == victim:
            raise error
        if looks:
            while True:
                world.check()
        with world.stoppable():
            while True:
                pass
    return found


def interrupted(rank: int, victim: int, busy: int):
    """One rank is interrupted in the middle of an exchange. Another works, the others wait for the answer."""
    world = World.current()
    with caught() as found, world.together(), ExitStack() as stack:
        if rank == victim:
            stack.enter_context(mock.patch.object(World, "_receive", side_effect=KeyboardInterrupt))
        while rank == busy:
            world.check()
        world.agree("here")
    again: list[str] = []
    if rank != victim:
        with caught() as again, world.together():
            world.agree("again")
    return found, again


@contextmanager
def caught() -> Iterator[list[str]]:
    """The class and message of an exception within, interrupts included."""
    found: list[str] = []
    try:
        yield found
    except BaseException as error:
        found += [type(error).__name__, str(error)]
