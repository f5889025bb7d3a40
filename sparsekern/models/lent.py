"""Weights that a block of a streamed model borrows from an earlier one, for forwards that show structure and whose values do not matter."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

KEPT = 2  # blocks, as many as a run has in memory


class Lent:
    """The weights of the blocks that were read last, one of each kind.

    Two blocks are of one kind if their modules have the same classes, and their tensors the same names, shapes and dtypes.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}  # parameters and buffers

    def keep(self, block: nn.Module) -> None:
        """Lend the weights of a block, which is in memory, from now on. Of more kinds than two the oldest is forgotten."""
        kind = _kind(block)
        self._kept.pop(kind, None)
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        stored = block.state_dict().keys()
        buffers = {name: buffer for name, buffer in block.named_buffers() if name in stored}
        self._kept[kind] = {name: parameter.detach() for name, parameter in block.named_parameters(remove_duplicate=False)}, buffers

    def fill(self, block: nn.Module) -> bool:
        """Give a block the weights of one of its kind, and return whether there is one."""
        kind = _kind(block)
        if kind not in self._kept:
            return False
        parameters, buffers = self._kept[kind] = self._kept.pop(kind)  # now the last that was used
        for name, tensor in parameters.items():
            owner, _, own = name.rpartition(".")
            module = block.get_submodule(owner)
            module._parameters[own] = nn.Parameter(tensor, block.get_parameter(name).requires_grad)
        for name, tensor in buffers.items():
            owner, _, own = name.rpartition(".")
            block.get_submodule(owner)._buffers[own] = tensor
        return True


def _kind(block: nn.Module) -> Hashable:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tensor.shape, tensor.dtype) for name, tensor in block.state_dict().items())
