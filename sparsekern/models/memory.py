"""How much memory a streamed model needs, and whether a limit leaves enough for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

from torch import nn

from .limits import memory_limit
from .linears import is_unread
from .streaming import stream_of

PROGRAM = 400_000_000  # bytes of the interpreter, its libraries and what is not counted
ROUTED = 4  # experts of a layer at once, with some to spare: one after another, most programs run them
Needs = dict[str, int]  # bytes by what they are for


def room_beside(model: nn.Module, max_memory: int | str | None, more: Mapping[str, int] | None = None) -> int | None:
    """Return how many bytes a limit leaves beside what a call needs in any case; None without a limit.

    Args:
        model: the model, whose blocks are on disk.
        max_memory: the limit, as `memory_limit` takes it.
        more: the bytes that the call needs beside the program and the model, by what they are for.

    Raises:
        TypeError: `max_memory` is not a limit.
        ValueError: likewise; or `model` is in memory, or the limit is too low.
    """
    limit = memory_limit(max_memory)
    if limit is None:
        return None
    if stream_of(model) is None:
        raise ValueError("max_memory: expected a streamed model, got one in memory; load it with stream=True (--stream)")
    needs = {**needs_of(model), **(more or {})}
    if (needed := sum(needs.values())) > limit:
        parts = ", ".join(f"{_shown(size)} for {what}" for what, size in needs.items() if size)
        raise ValueError(f"max_memory: expected at least {_shown(needed)} ({parts}), got {limit / 1e6:,.1f} MB")
    return limit - needed


def needs_of(model: nn.Module) -> Needs:
    """Return the bytes of the program, of what is outside the blocks of a streamed model, and of two blocks.

    Raises:
        ValueError: the model is not streamed.
    """
    stream = stream_of(model)
    if stream is None:
        raise ValueError("model: expected a streamed one")
    blocks = [model.get_submodule(name) for name in stream.blocks]
    inside = {id(tensor) for block in blocks for tensor in chain(block.parameters(), block.buffers())}
    outside = sum(t.nbytes for t in chain(model.parameters(), model.buffers()) if id(t) not in inside and not is_unread(t))
    sizes = [_bytes_of_block(block) for block in blocks]
    largest = max((max(size, stream.size(index)) for index, size in enumerate(sizes)), default=0)
    return {"the program": PROGRAM, "what is outside the blocks": outside, "two blocks": 2 * largest}


def forward_bytes(model: nn.Module, tokens: int) -> int:
    """Return the bytes of what the matrices of a streamed model's largest block take and return for that many tokens.

    Of stacked matrices four count, as those of experts that a token is routed to.
    """
    stream = stream_of(model)
    assert stream is not None
    found = [0]
    for name in stream.blocks:
        matrices = [parameter for parameter in model.get_submodule(name).parameters() if parameter.dim() > 1]
        widths = (sum(p.shape[-2:]) * p.element_size() * (1 if p.dim() == 2 else ROUTED) for p in matrices)
        found.append(tokens * sum(widths))
    return max(found)


def _bytes_of_block(block: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(block.parameters(), block.buffers()))


def _shown(size: int) -> str:
    """Return a size rounded up, so that what a message asks for is enough."""
    return f"{math.ceil(size / 1e5) / 10:,.1f} MB"
