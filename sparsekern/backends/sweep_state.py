"""The tensors of a sweep of `obs_sweep` on a CUDA device, and the blocks of columns that it goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

LAUNCH_COLUMNS = 128  # most columns of one launch
ALIGNMENT = 4  # columns; blocks of the CUDA C++ kernels begin at multiples of it


class Block(NamedTuple):
    """Columns of a block: `[begin, end)` of the weight, stored at `[first, last)` of the sweep's matrices.

    Attributes:
        begin: first column in the weight.
        end: end of the columns in the weight, exclusive.
        first: first column in the sweep's matrices.
        last: end of the columns in the sweep's matrices, exclusive.
        border: end of the padding, where the next block begins.
    """

    begin: int
    end: int
    first: int
    last: int
    border: int


def column_blocks(columns: int, size: int, alignment: int) -> list[Block]:
    """Return blocks of `size` columns, each beginning at a multiple of `alignment` columns of the sweep's matrices."""
    blocks, first = [], 0
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        last = first + end - begin
        blocks.append(Block(begin, end, first, last, -(-last // alignment) * alignment))
        first = blocks[-1].border
    return blocks


@dataclass(frozen=True)
class Sweep:
    """The tensors of one sweep, contiguous and aligned to 16 bytes. Columns are where `blocks` say.

    All but `status` have a leading dimension more in the sweep of a batch.

    Attributes:
        blocks: the blocks of columns.
        weight: `[rows, columns]`.
        factor: `[columns, columns]` float32; padding is dead features.
        mask: `[rows, columns]` bool, given or found block by block.
        delta: `[rows, columns]` float32, `weight - new_weight`; pending sums in later columns.
        new_weight: `[rows, columns]` in the dtype of `weight`.
        row_error: `[rows]` float32.
        status: int32 scalar on the device.
    """

    blocks: list[Block]
    weight: torch.Tensor
    factor: torch.Tensor
    mask: torch.Tensor
    delta: torch.Tensor
    new_weight: torch.Tensor
    row_error: torch.Tensor
    status: torch.Tensor


def _positions(blocks: list[Block], device: torch.device) -> torch.Tensor | None:
    """Return the column in the sweep of each column of the weight; None if they are the same."""
    if not blocks or blocks[-1].border == blocks[-1].end:
        return None
    return torch.cat([torch.arange(block.first, block.last, device=device) for block in blocks])


def allocate(weight: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor | None, blocks: list[Block]) -> Sweep:
    columns = _positions(blocks, weight.device)
    if columns is None:
        weight, factor = _aligned(weight), _aligned(factor)
        chosen = torch.empty_like(weight, dtype=torch.bool) if mask is None else mask.clone(memory_format=torch.contiguous_format)
    else:
        width = blocks[-1].border
        weight = weight.new_zeros((*weight.shape[:-1], width)).index_copy_(-1, columns, weight)
        dead = torch.diag_embed(factor.new_full((*factor.shape[:-2], width), -1.0))
        dead[..., columns[:, None], columns] = factor
        factor = dead
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        if mask is not None:
            chosen.index_copy_(-1, columns, mask)
    return Sweep(
        blocks,
        weight,
        factor,
        chosen,
        delta=torch.empty_like(weight, dtype=torch.float32),
        new_weight=torch.empty_like(weight),
        row_error=weight.new_zeros(weight.shape[:-1], dtype=torch.float32),
        status=weight.new_zeros((), dtype=torch.int32),
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def results(state: Sweep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = _positions(state.blocks, state.weight.device)
    if columns is None:
        return state.new_weight, state.mask, state.row_error
    return state.new_weight[..., columns], state.mask[..., columns], state.row_error
