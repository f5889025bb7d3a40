"""Find the repeated blocks of a model: the heaviest list of modules that hold linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .linears import find_linears


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in order.

    Attributes:
        name: name of their list, such as `model.layers`.
        modules: the blocks.
    """

    name: str
    modules: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """Return the name of block `index` in the model."""
        return f"{self.name}.{index}"


def find_blocks(model: nn.Module) -> Blocks:
    """Return the `nn.ModuleList` with the most weights in linears; its entries share one class and each holds a linear.

    Names do not matter. A list inside a block, such as its experts, weighs less than the list of blocks around it; of equals the outer
    one is taken. Whether a forward runs the blocks in order is checked when the model first runs.

    Raises:
        ValueError: the model has no linears, or no such list.
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
