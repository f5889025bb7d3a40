"""Say what stays dense, or refuse a model of which too much would."""

from __future__ import annotations

import warnings

from .._warnings import SparsekernWarning
from ..models import Blocks, Linear
from ..models.expert_checks import unknown_experts

SHOWN = 3  # names in a message that is about many


def check_experts(blocks: Blocks) -> None:
    """Raise `ValueError` if a block holds experts of an unknown layout, which would stay dense."""
    for index, block in enumerate(blocks.modules):
        for name, module in unknown_experts(block, blocks.block_name(index)).items():
            raise ValueError(
                f"model: {name} ({type(module).__name__}) holds experts in a layout that sparsekern does not know, which would stay "
                "dense; include names the other linears to prune"
            )


def say_what_stays_dense(blocks: Blocks, linears: list[list[Linear]]) -> None:
    """Warn of parameters of three dimensions that are neither linears nor experts of a known layout."""
    known = {id(linear.parameter) for part in linears for linear in part}
    stacked = [
        f"{blocks.block_name(index)}.{name}"
        for index, block in enumerate(blocks.modules)
        for name, parameter in block.named_parameters()
        if parameter.dim() > 2 and id(parameter) not in known
    ]
    if stacked:
        warnings.warn(
            f"{shortened(stacked)}: parameters of the blocks that are not linear layers stay dense",
            SparsekernWarning,
            stacklevel=4,
        )


def say_which_stacks_stay_dense(blocks: Blocks) -> None:
    """Warn of towers beside a language model, which only `include` prunes."""
    towers = [stack.name for stack in blocks.stacks if not stack.by_default]
    if towers:
        globs = ", ".join(f"{name}.*" for name in towers)
        warnings.warn(
            f"{', '.join(towers)}: stay dense, since only the language model is pruned by default; include={globs} prunes them",
            SparsekernWarning,
            stacklevel=4,
        )


def shortened(names: list[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
