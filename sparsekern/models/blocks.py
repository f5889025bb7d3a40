"""The repeated decoder blocks of a model, found as the heaviest list of modules that hold linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .linears import find_linears


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in order; `name` is that of their list, such as `model.layers`."""

    name: str
    modules: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


def find_blocks(model: nn.Module) -> Blocks:
    """The `nn.ModuleList` with the most weights in linears, of which every entry is of one class and holds a linear.

    No name is looked at. Lists inside a block (experts, say) weigh less than the list of blocks that holds them; where both weigh
    the same, the outer one is taken. That a forward really runs the blocks in order is checked when the model is first run.

    Raises:
        ValueError: a model with no linears or with no such list.
    """
    if not find_linears(model):
        raise ValueError(f"model: found no linear layers in {type(model).__name__}, so there is nothing to prune")
    best, most = None, 0
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and (weights := _linear_weights(modules)) > most:
            best, most = Blocks(name, tuple(modules)), weights
    if best is None:
        raise ValueError(
            f"model: found no repeated blocks in {type(model).__name__} "
            "(expected an nn.ModuleList of one class of modules with linears)"
        )
    if len(set(map(id, best.modules))) < len(best.modules):
        raise ValueError(f"model: {best.name} runs the same block more than once, which block-by-block pruning cannot do")
    return best


def _linear_weights(modules: nn.ModuleList) -> int:
    if len({type(module) for module in modules}) != 1:
        return 0
    found = [find_linears(module) for module in modules]
    return sum(linear.weight.numel() for linears in found for linear in linears) if all(found) else 0
