"""Experts that are modules of their own in a list, such as those of Switch and of classes written before transformers fused them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .gates import listed_experts
from .linears import find_linears


class ListedExperts:
    """The experts of one layer, each a module in a list or a mapping of modules.

    Attributes:
        name: the name of the list in the model.
        module: the list.
        owner: the module that holds the list and the router, and calls the experts.
    """

    def __init__(self, name: str, module: nn.Module, owner: nn.Module) -> None:
        self.name, self.module, self.owner = name, module, owner

    @property
    def members(self) -> dict[str, nn.Module]:
        """The experts by their names in the list; what holds no linear is not one."""
        return {name: child for name, child in self.module.named_children() if find_linears(child)}

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.members)

    @property
    def further(self) -> int:
        """The number of choices of the router that are no experts."""
        return 0

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return next(self.module.parameters()).device

    def keep(self, numbers: Sequence[int]) -> None:
        """Remove all experts but these, which take the first names of the list."""
        members = self.members
        names, modules = list(members), list(members.values())
        for name, number in zip(names, numbers, strict=False):
            self.module._modules[name] = modules[number]
        for name in names[len(numbers) :]:
            del self.module._modules[name]


def find_listed(root: nn.Module) -> list[ListedExperts]:
    """Return the lists of experts in a model, in its order."""
    names = [name.removeprefix(".") for name in listed_experts(root, "")]
    return [ListedExperts(name, root.get_submodule(name), root.get_submodule(name.rpartition(".")[0])) for name in names]
