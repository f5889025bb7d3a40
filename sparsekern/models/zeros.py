"""The number of zeros in the weights of a model. Those of a streamed model's blocks are counted while the blocks are in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .._counts import nonzeros
from .linears import is_unread
from .streaming import in_memory, stream_of


def count_block(model: nn.Module, index: int) -> None:
    """Remember the zeros of a streamed model's block, which is in memory and does not change any more."""
    stream = stream_of(model)
    assert stream is not None
    stream.zeros[index] = zeros_of(model.get_submodule(stream.blocks[index]).parameters())


def count_stored(model: nn.Module) -> tuple[int, int]:
    """Return the number of zeros and of all values of a model's parameters. Blocks of a streamed model whose zeros are not known are read."""
    found = [zeros_of(parameter for parameter in model.parameters() if not is_unread(parameter))]
    stream = stream_of(model)
    for index in range(len(stream.blocks) if stream else 0):
        if stream and index not in stream.zeros:
            with in_memory(model, index):
                count_block(model, index)
    known = [*found, *(stream.zeros.values() if stream else ())]
    return sum(zeros for zeros, _ in known), sum(total for _, total in known)


def zeros_of(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return the number of zeros and of all values of some tensors."""
    counts = [(tensor.numel() - int(nonzeros(tensor)), tensor.numel()) for tensor in tensors]
    return sum(zeros for zeros, _ in counts), sum(total for _, total in counts)
