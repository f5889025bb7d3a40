"""Which linear gets which pattern: decided, and checked, before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from .._warnings import SparsekernWarning
from ..models import Blocks, Linear, find_blocks, find_linears
from ..models.globs import Globs, as_globs, check_matches, matches
from ..pattern import Pattern, parse_pattern
from ..runtime import is_packed

PatternLike = str | float | Pattern


@dataclass(frozen=True)
class Plan:
    """The linears to prune, block by block and outside the blocks, and the pattern of each by name."""

    blocks: Blocks
    block_linears: tuple[tuple[Linear, ...], ...]
    outside_linears: tuple[Linear, ...]
    patterns: dict[str, Pattern]

    @property
    def parts(self) -> tuple[tuple[Linear, ...], ...]:
        """The linears of each block, and last those outside the blocks."""
        return (*self.block_linears, self.outside_linears)

    @property
    def linears(self) -> list[Linear]:
        return [linear for linears in self.block_linears for linear in linears] + list(self.outside_linears)


def make_plan(
    model: nn.Module, pattern: PatternLike, patterns: Mapping[str, PatternLike | None] | None, include: Globs, exclude: Globs
) -> Plan:
    """Choose the linears to prune. See `sparsekern.prune` for the arguments.

    Raises:
        ValueError, TypeError: no linears; a glob that matches nothing; features not divisible by M; a NaN or Inf weight; a weight
            that is tied to something that is not pruned; weights on more than one device.
    """
    if is_packed(model):
        raise ValueError("model: its linears are packed; sparsekern.unpack(model) makes them dense again")
    blocks = find_blocks(model)
    inside = [_with_weights(find_linears(block, blocks.block_name(i))) for i, block in enumerate(blocks.modules)]
    in_blocks = {linear.name for linears in inside for linear in linears}
    outside = [linear for linear in _with_weights(find_linears(model)) if linear.name not in in_blocks]
    everything = [linear.name for linears in inside for linear in linears] + [linear.name for linear in outside]

    include, exclude = as_globs("include", include), as_globs("exclude", exclude)
    default = parse_pattern(pattern)
    by_glob = {glob: None if value is None else parse_pattern(value) for glob, value in (patterns or {}).items()}
    for argument, globs in (("include", include), ("exclude", exclude), ("patterns", by_glob)):
        check_matches(argument, globs, everything)

    def chosen(linear: Linear) -> bool:
        name = linear.name
        if name in in_blocks:
            wanted = include is None or matches(name, include)
        else:
            wanted = name in (include or ())
        wanted = wanted and not matches(name, exclude)
        return wanted and _pattern_of(name, by_glob, default) is not None

    plan = Plan(
        blocks,
        tuple(tuple(filter(chosen, linears)) for linears in inside),
        tuple(filter(chosen, outside)),
        {name: _pattern_of(name, by_glob, default) for name in everything},
    )
    if not plan.linears:
        raise ValueError("include, exclude, patterns: together they leave no linear to prune")
    kept = {linear.name: plan.patterns[linear.name] for linear in plan.linears}
    plan = Plan(plan.blocks, plan.block_linears, plan.outside_linears, kept)
    _check_ties(model, plan.linears)
    check_device(model)
    for linear in plan.linears:
        kept[linear.name].check_features(linear.features, linear.name)
        check_finite(linear)
    _say_what_stays_dense(blocks)
    return plan


def _with_weights(linears: list[Linear]) -> list[Linear]:
    """Those that have a weight left: structured pruning may have cut all of them."""
    return [linear for linear in linears if linear.weight.numel()]


def _pattern_of(name: str, by_glob: Mapping[str, Pattern | None], default: Pattern) -> Pattern | None:
    return next((pattern for glob, pattern in by_glob.items() if fnmatchcase(name, glob)), default)


def _check_ties(model: nn.Module, linears: list[Linear]) -> None:
    """Pruning a linear must change nothing but the modules that were asked for, and each weight once."""
    pruned_modules = {module for linear in linears for module in linear.modules}
    chosen = {id(linear.modules[0].weight): linear.name for linear in linears}
    if len(chosen) < len(linears):
        names = ", ".join(linear.name for linear in linears if chosen[id(linear.modules[0].weight)] != linear.name)
        raise ValueError(f"{names}: shares its weight with a linear of another block, which block-by-block pruning cannot do")
    for name, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in chosen and module not in pruned_modules:
                raise ValueError(
                    f"{chosen[id(parameter)]}: its weight is tied to {name}.{own_name}, which pruning would change too; "
                    "leave it out, or untie the two first"
                )


def check_device(model: nn.Module) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"model: expected all weights on one device, got {', '.join(devices)}")


def _say_what_stays_dense(blocks: Blocks) -> None:
    """Fused experts are one tensor of three dimensions, not linears: to leave most of a model dense must not go unsaid."""
    stacked = [
        f"{blocks.block_name(index)}.{name}"
        for index, block in enumerate(blocks.modules)
        for name, parameter in block.named_parameters()
        if parameter.dim() > 2
    ]
    if stacked:
        warnings.warn(
            f"{stacked[0]} and {len(stacked) - 1} more parameters of the blocks are no linear layers and stay dense",
            SparsekernWarning,
            stacklevel=4,
        )


def check_finite(linear: Linear) -> None:
    """Raise `ValueError` that names the linear and the first NaN or Inf of its weight."""
    low, high = linear.modules[0].weight.detach().aminmax()
    if not torch.isfinite(high - low):
        where = (~torch.isfinite(linear.weight)).nonzero()
        if len(where):
            row, column = (int(i) for i in where[0])
            raise ValueError(
                f"{linear.name}: expected finite weights, got {float(linear.weight[row, column])} at [{row}, {column}]"
            )
