"""How much memory a streamed model needs, and whether a limit leaves enough for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

from torch import nn

from .checkpoint_conversion import joins_tensors
from .limits import memory_limit
from .linears import is_unread
from .streaming import Stream, stream_of
from .weight_files import dtype_of

PROGRAM = 400_000_000  # bytes of the interpreter, its libraries and what is not counted
ROUTED = 4  # experts of a layer at once, with some to spare: one after another, most programs run them
SCORES = 3  # copies of the products of queries and keys in an eager attention: scaled, masked, and their softmax
Needs = dict[str, int]  # bytes by what they are for


def room_beside(
    model: nn.Module, max_memory: int | str | None, more: Mapping[str, int] | None = None, *, edited: bool = False
) -> int | None:
    """Return how many bytes a limit leaves beside what a call needs in any case; None without a limit.

    Args:
        model: the model, whose blocks are on disk.
        max_memory: the limit, as `memory_limit` takes it.
        more: the bytes that the call needs beside the program and the model, by what they are for.
        edited: the call changes blocks whenever they have been read.

    Raises:
        TypeError: `max_memory` is not a limit.
        ValueError: likewise; or `model` is in memory, or the limit is too low.
    """
    limit = memory_limit(max_memory)
    if limit is None:
        return None
    if stream_of(model) is None:
        raise ValueError("max_memory: expected a streamed model, got one in memory; load it with stream=True (--stream)")
    needs = {**needs_of(model, edited=edited), **(more or {})}
    if (needed := sum(needs.values())) > limit:
        parts = ", ".join(f"{_shown(size)} for {what}" for what, size in needs.items() if size)
        rest = " and what the call needs beside the model" if more is None else ""
        raise ValueError(f"max_memory: expected at least {_shown(needed)} ({parts}){rest}, got {limit / 1e6:,.1f} MB")
    return limit - needed


def needs_of(model: nn.Module, *, edited: bool = False) -> Needs:
    """Return the bytes of the program, of what is outside the blocks of a streamed model, and of the blocks that are in memory at once.

    These are two: the one at hand, and the next or the last one, which is read or written. A third is a copy of one in another form, where
    the checkpoint has another than the model, or where blocks are changed whenever they have been read (`edited`).

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
    copied = edited or any(_makes_copies(model, stream, index) for index in range(len(blocks)))
    held = {"two blocks and a copy of one": 3 * largest} if copied else {"two blocks": 2 * largest}
    return {"the program": PROGRAM, "what is outside the blocks": outside, **held}


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


def score_bytes(model: nn.Module, samples: int, length: int) -> int:
    """Return the bytes of the products of queries and keys of a block, where the model's attention holds all of them at once."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    return SCORES * 4 * samples * int(getattr(config, "num_attention_heads", 1)) * length**2


def _makes_copies(model: nn.Module, stream: Stream, index: int) -> bool:
    """Return whether a block has other tensors than the checkpoint, or of another dtype, so that reading or writing it copies it."""
    stored = {dtype_of(stream.stored[name]) for name in stream.names[index]}
    held = {parameter.dtype for parameter in model.get_submodule(stream.blocks[index]).parameters()}
    return stream.is_edited(index) or joins_tensors(model) or stored != held


def _bytes_of_block(block: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(block.parameters(), block.buffers()))


def _shown(size: int) -> str:
    """Return a size rounded up, so that what a message asks for is enough."""
    return f"{math.ceil(size / 1e5) / 10:,.1f} MB"
