"""Results that processes give one another, several in each message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ...ranks import World

MESSAGE = 2**25  # bytes of results that are sent at once


def split_rows(rows: torch.Tensor) -> Iterable[torch.Tensor]:
    """Return rows of a weight in parts that a message can hold."""
    return rows.split(max(1, MESSAGE // max(rows[:1].nbytes, 1)))


def messages(parts: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield tensors a few at a time: a message for each one takes ten times as long, one for all takes the memory of a block."""
    together: list[torch.Tensor] = []
    for part in parts:
        if together and sum(other.nbytes for other in together) + part.nbytes > MESSAGE:
            yield together
            together = []
        together.append(part)
    if together:
        yield together


def pass_on(world: World, parts: Sequence[torch.Tensor], source: int) -> None:
    """Replace tensors by those of the rank `source`, in one message."""
    sizes = [part.nbytes for part in parts]
    message = torch.empty(sum(sizes), dtype=torch.uint8, device=parts[0].device)
    if world.rank == source:
        torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts], out=message)
        world.formula += len(message)
    world.broadcast(message, source)
    if world.rank != source:
        for part, found in zip(parts, message.split(sizes), strict=True):
            part.copy_(found.clone().view(part.dtype).view(part.shape))
