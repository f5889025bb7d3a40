"""Find the repeated blocks of a model: every list of modules that hold linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import nn

from .linears import find_linears, is_conv1d


@dataclass(frozen=True)
class Stack:
    """One list of blocks that a forward runs, such as an encoder, a decoder or a vision tower.

    Attributes:
        name: the name of the list, such as `model.layers`.
        modules: the blocks. Their classes may differ, and some may hold no linears.
        by_default: True if the stack is pruned unless names say otherwise; False for the towers beside a language model.
    """

    name: str
    modules: tuple[nn.Module, ...]
    by_default: bool = True


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, numbered through all its stacks.

    Attributes:
        stacks: the stacks in the order of the model's modules.
    """

    stacks: tuple[Stack, ...]

    @property
    def name(self) -> str:
        """The names of the stacks that are pruned by default."""
        return ", ".join(stack.name for stack in self.stacks if stack.by_default)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """The blocks of all stacks."""
        return tuple(module for stack in self.stacks for module in stack.modules)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks in the model."""
        return tuple(f"{stack.name}.{index}" for stack in self.stacks for index in range(len(stack.modules)))

    @cached_property
    def by_default(self) -> tuple[bool, ...]:
        """True for each block of a stack that is pruned by default."""
        return tuple(stack.by_default for stack in self.stacks for _ in stack.modules)

    def block_name(self, index: int) -> str:
        """Return the name of block `index` in the model."""
        return self.names[index]


def find_blocks(model: nn.Module) -> Blocks:
    """Return the stacks of a model: each outermost `nn.ModuleList` of modules that hold linears.

    Names do not matter. A list inside a block, such as its experts, belongs to the block. Where there is no such list, an
    `nn.Sequential` of modules of one class or a list of bare linears is taken. Of a language model with towers for images or sound,
    the towers are not pruned by default. Of an encoder and its decoder, both are. How a forward runs the blocks is observed when the
    model first runs.

    Raises:
        ValueError: the model has no linears, or no such list, or a list that holds a block twice.
    """
    if not find_linears(model):
        raise ValueError(f"model: found no linear layers in {type(model).__name__}, so there is nothing to prune")
    found = next((lists for is_stack in (_is_list, _is_sequence, _is_bare_list) if (lists := _lists(model, is_stack))), None)
    if found is None:
        raise ValueError(
            f"model: found no repeated blocks in {type(model).__name__} (expected an nn.ModuleList of modules with linears)"
        )
    for name, modules in found.items():
        if len(set(map(id, modules))) < len(modules):
            raise ValueError(f"model: {name} runs the same block more than once, which block-by-block pruning cannot do")
    chosen = _by_default(model, list(found))
    return Blocks(tuple(Stack(name, modules, name in chosen) for name, modules in found.items()))


def _lists(model: nn.Module, is_stack: Callable[[nn.Module], bool]) -> dict[str, tuple[nn.Module, ...]]:
    """Return the outermost modules for which `is_stack` is true, by name, as tuples of their entries."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    seen: set[nn.Module] = set()

    def entries(stack: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(stack.children()) if isinstance(stack, nn.Sequential) else tuple(cast(nn.ModuleList, stack))

    def search(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            if child in seen:
                continue
            seen.add(child)
            if is_stack(child):
                found[name] = entries(child)
            else:
                search(child, name)

    if is_stack(model):
        return {"": entries(model)}
    search(model, "")
    return found


def _is_list(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.ModuleDict)  # which are never called: the blocks are in them
    if not isinstance(module, nn.ModuleList) or any(isinstance(entry, containers) for entry in module):
        return False
    return any(find_linears(entry) and not _is_bare(entry) for entry in module)


def _is_sequence(module: nn.Module) -> bool:
    entries = list(module.children())
    alike = len(entries) > 1 and len(set(map(type, entries))) == 1
    return isinstance(module, nn.Sequential) and alike and not _is_bare(entries[0]) and bool(find_linears(module))


def _is_bare_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(map(_is_bare, module))


def _is_bare(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _by_default(model: nn.Module, names: list[str]) -> set[str]:
    """Return the stacks to prune by default: all, but of a language model among towers only its own."""
    embedding = _embedding_of_text(model)
    if embedding is None:
        return set(names)
    depths = {name: _common_depth(name, embedding) for name in names}
    nearest = {name for name, depth in depths.items() if depth == max(depths.values())}
    config: Any = model.config
    # An encoder of sound or images may stand beside a decoder that has the text to itself.
    return set(names) if getattr(config, "is_encoder_decoder", False) and len(nearest) == 1 else nearest


def _embedding_of_text(model: nn.Module) -> str | None:
    """Return the name of the token embedding of a language model that is a part of `model`; None where it is the whole model."""
    config: Any = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    text = None if find is None else find(decoder=True)
    if text is None or text is config:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    can_generate = getattr(model, "can_generate", bool)
    encodes = getattr(config, "is_encoder_decoder", False)
    if not (can_generate() or encodes or text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return None
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]  # of PreTrainedModel, which has a config
    except NotImplementedError:
        return None
    return next((name for name, module in model.named_modules() if module is embedding), None)


def _common_depth(first: str, second: str) -> int:
    depth = 0
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        depth += 1
    return depth
