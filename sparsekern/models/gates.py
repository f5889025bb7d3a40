"""Find the small matrices of a block that route or mix: they hold next to no weights, and pruning them costs the most.

They are found by structure: router gates beside experts, gates with one output (of a shared expert), and matrices that mix a few
numbers into a few (AltUp), with the gates that make these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from .expert_layouts import experts_of
from .experts import ExpertLinear, Experts
from .linears import Linear, find_linears, is_conv1d

FEW = 16  # inputs: a matrix that mixes has fewer,
SHARE = 8  # the block is at least so many times as wide,
POWER = 2  # and it has at most this power of its inputs as outputs (AltUp predicts n x n coefficients from n numbers)


def find_gates(block: nn.Module, linears: Sequence[Linear], prefix: str) -> list[Linear]:
    """Return the linears of a block that are router gates, gates with one output, or small mixing matrices.

    A router gate has one output an expert, and is beside the experts or in a module beside them. A matrix mixes if it has `n < 16`
    inputs and at most `n * n` outputs, in a block that is at least eight times as wide as `n`. The width is the largest smaller side
    of its linears. A linear with `n` outputs in the same module makes the numbers that are mixed.

    Args:
        block: the block.
        linears: all its linears.
        prefix: the name of the block, with which the names of `linears` begin.
    """
    routers = set(_router_names(block, prefix))
    plain = [linear for linear in linears if not isinstance(linear.modules[0], ExpertLinear)]
    width = max((min(linear.shape) for linear in plain), default=0)
    mixed = {(_owner(linear), linear.features) for linear in plain if _mixes(linear, width)}
    fed_by_one = {_owner(linear) for linear in plain if linear.features == 1}  # a network with one neuron left is not a gate

    def is_gate(linear: Linear) -> bool:
        rows, columns = linear.shape
        is_single = rows == 1 < columns and _owner(linear) not in fed_by_one
        return is_single or _mixes(linear, width) or (_owner(linear), rows) in mixed

    return [linear for linear in plain if linear.name in routers or is_gate(linear)]


def listed_experts(block: nn.Module, prefix: str) -> dict[str, int]:
    """Return the lists of experts that have linears of their own: the number of experts by name.

    Such a list holds modules of one class with linears of equal shapes, and a module beside it holds a matrix with one row an expert.
    """
    found: dict[str, int] = {}
    for parent_name, parent in block.named_modules(prefix=prefix):
        for name, child in parent.named_children():
            count = _alike(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else 0
            if count > 1:
                others = (other for other in parent.children() if other is not child)
                own = [*parent.parameters(recurse=False), *(parameter for other in others for parameter in other.parameters())]
                if any(parameter.dim() == 2 and len(parameter) == count for parameter in own):
                    found[f"{parent_name}.{name}"] = count
    return found


def bare_routers(block: nn.Module, prefix: str) -> list[str]:
    """Return the names of the modules beside experts that hold a router's matrix in a parameter of their own, without a linear."""
    return [
        name
        for beside_name, beside, counts in _beside_experts(block, prefix)
        for name, module in beside.named_modules(prefix=beside_name)
        if not (isinstance(module, nn.Linear) or is_conv1d(module))
        and any(
            parameter is not None and parameter.dim() == 2 and len(parameter) in counts for parameter in module._parameters.values()
        )
    ]


def _router_names(block: nn.Module, prefix: str) -> Iterator[str]:
    for name, beside, counts in _beside_experts(block, prefix):
        linears = find_linears(beside, name)
        if all(len(linear.weight) in counts for linear in linears):
            yield from (linear.name for linear in linears)


def _beside_experts(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, set[int]]]:
    """Yield the name and the module of what is beside experts, and the numbers of the experts."""
    lists = listed_experts(block, prefix)
    for parent_name, parent in block.named_modules(prefix=prefix):
        for name, child in parent.named_children():
            full = f"{parent_name}.{name}"
            fused = experts_of(full, child)
            if fused is not None:
                counts = _counts(fused)
            elif full in lists:
                counts = {lists[full]}
            else:
                continue
            for beside_name, beside in parent.named_children():
                if beside is not child:
                    yield f"{parent_name}.{beside_name}", beside, counts


def _counts(experts: Experts) -> set[int]:
    """Return the numbers of experts; they differ where some experts have no matrices of some kind (LongCat's)."""
    return {experts.stacked(part).shape[0] for part in experts.parts}


def _mixes(linear: Linear, width: int) -> bool:
    """Return whether a linear mixes a few numbers into a few."""
    rows, columns = linear.shape
    return columns < FEW and columns * SHARE <= width and rows <= columns**POWER


def _owner(linear: Linear) -> str:
    return linear.name.rpartition(".")[0]


def _alike(modules: nn.Module) -> int:
    """Return the number of the modules with linears in a list; 0 unless they are of one class, with linears of the same shapes."""
    found = [(type(module), [linear.shape for linear in find_linears(module)]) for module in modules.children()]
    experts = [(kind, shapes) for kind, shapes in found if shapes]
    return len(experts) if all(expert == experts[0] for expert in experts) else 0
