"""The plan of a run: the pattern of each linear, chosen and checked before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .._warnings import SparsekernWarning
from ..methods import BlockTuning, Distill
from ..methods.allocation import UNIFORM
from ..methods.base import GradualMethod, LinearMethod, Method, PlannedBlock
from ..models import Blocks, FeedForward, Linear, find_blocks, find_linears
from ..models.decoder_units import Units, find_units
from ..models.encoder import is_encoder
from ..models.experts import ExpertLinear
from ..models.gates import bare_routers, find_gates, listed_experts
from ..models.globs import Globs, as_globs, check_matches, first_match, matches
from ..models.linears import is_unread
from ..pattern import NM, Pattern, parse_pattern
from ..runtime import is_packed
from .batches import Calibration
from .corrections import DENSE, NONE
from .left_dense import check_experts, say_what_stays_dense, say_which_stacks_stay_dense, shortened
from .mixtures import ROUTING, ExpertRules
from .session import check_format_fits

if TYPE_CHECKING:
    from .blockwise.course import Course

PatternLike = str | float | Pattern
Choice = Globs | Callable[[str, nn.Module], bool]
DEFAULT_PATTERN = NM(2, 4)


@dataclass(frozen=True)
class Request:
    """The arguments of `sparsekern.prune` that a plan is made from, with the same names.

    Attributes:
        pattern: see `prune`.
        calibration: see `prune`.
        include: see `prune`.
        exclude: see `prune`.
        patterns: see `prune`.
        batch_size: see `prune`.
        report_error: see `prune`.
        format: see `prune`.
        saves: True if the model is saved.
        seed: see `prune`.
        rules: `weighting` and `unseen`, see `prune`.
        then: see `prune`.
        correction: see `prune`.
        tune: see `prune`.
        allocation: see `prune`.
        distill: see `prune`.
        leaves: the number of parts that statistics are summed in.
        optional: of `tune`, `distill` and `allocation` those that are left out where the model cannot have them.
        max_memory: see `prune`.
        folder: the folder `out`, for what does not stay in memory; None is the one for temporary files.
    """

    pattern: Pattern | None = None
    calibration: Calibration | None = None
    include: Choice = None
    exclude: Choice = None
    patterns: Mapping[str, PatternLike | None] | None = None
    batch_size: int | None = None
    report_error: bool = False
    format: str = "dense"
    saves: bool = False
    seed: int = 0
    rules: ExpertRules = field(default_factory=ExpertRules)
    then: Method | None = None
    correction: str = NONE
    tune: BlockTuning | None = None
    allocation: str = UNIFORM
    distill: Distill | None = None
    leaves: int = 1
    optional: frozenset[str] = frozenset()
    max_memory: int | str | None = None
    folder: Path | None = None

    @property
    def default_pattern(self) -> Pattern:
        """The pattern of linears without one of their own."""
        return DEFAULT_PATTERN if self.pattern is None else self.pattern


@dataclass(frozen=True)
class Plan:
    """The linears to prune, and their patterns.

    Attributes:
        blocks: the blocks of the model.
        block_linears: the linears to prune, block by block.
        outside_linears: the linears to prune outside the blocks.
        patterns: the pattern of each linear, by name.
        networks: the feed-forward network of each block if it is solved together; None if no network is.
        measure_error: take a Gram matrix to report errors, even if the method needs none.
        listed: the names of the linears of experts that are modules of their own.
        rules: how experts are calibrated.
        course: the course of the model's forwards; None until it is observed.
        correction: what is done about the error of what is pruned already, see `corrections`.
        tune: how each block is tuned behind the method; None does not.
        allocation: how the patterns were shared out among the linears, see `prune`.
        distill: how the whole model is trained at the end; None does not.
        left_out: what of the request the model cannot have, and why.
    """

    blocks: Blocks
    block_linears: tuple[tuple[Linear, ...], ...]
    outside_linears: tuple[Linear, ...]
    patterns: dict[str, Pattern]
    networks: tuple[FeedForward | None, ...] | None = None
    measure_error: bool = False
    listed: frozenset[str] = frozenset()
    rules: ExpertRules = field(default_factory=ExpertRules)
    course: Course | None = None
    correction: str = NONE
    tune: BlockTuning | None = None
    allocation: str = UNIFORM
    distill: Distill | None = None
    left_out: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[tuple[Linear, ...], ...]:
        """The linears of each block, followed by those outside the blocks."""
        return (*self.block_linears, self.outside_linears)

    @property
    def linears(self) -> list[Linear]:
        """All linears to prune."""
        return [linear for linears in self.block_linears for linear in linears] + list(self.outside_linears)

    @property
    def needs_dense_stream(self) -> bool:
        """True if the hidden states of the dense model are made beside those of the pruned one."""
        return self.correction == DENSE or self.tune is not None

    @property
    def steps(self) -> int:
        """The number of linears, each of which is reported."""
        return len(self.linears)

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the result besides method, seed, calibration and model, as values that JSON can hold."""
        patterns = {name: str(value) for name, value in self.patterns.items()}
        found: dict[str, object] = {"patterns": patterns, "report_error": self.measure_error, **self.settings_of_experts}
        found |= {} if self.correction == NONE else {"correction": self.correction}
        training = {"tune": self.tune, "distill": self.distill}
        found |= {name: config.settings() for name, config in training.items() if config is not None}
        return found | ({} if self.allocation == UNIFORM else {"allocation": self.allocation})

    @property
    def settings_of_experts(self) -> dict[str, object]:
        """The settings of `rules` where they matter: there are experts, or other rules than the default are asked for."""
        return asdict(self.rules) if self.has_experts or self.rules != ExpertRules() else {}

    @property
    def has_experts(self) -> bool:
        """True if experts are pruned, fused or not."""
        return bool(self.listed) or any(isinstance(linear.modules[0], ExpertLinear) for linear in self.linears)

    @property
    def by_routing(self) -> bool:
        """True if the tokens of experts are scaled by their routing weights."""
        return self.rules.weighting == ROUTING

    def calibrated(self, rules: ExpertRules) -> Plan:
        """Return the plan with the rules for its experts.

        Raises:
            ValueError: routing weights are asked for, and there are no experts, or experts whose routing weights are not seen.
        """
        listed = [linear.name for linear in self.linears if linear.name in self.listed]
        if rules.weighting == ROUTING and (listed or not self.has_experts):
            found = f"{shortened(listed)}, whose routing weights are not seen" if listed else "no experts to prune"
            raise ValueError(f"weighting: {ROUTING!r} expected fused experts, found {found}")
        return replace(self, rules=rules)

    def network(self, index: int) -> FeedForward | None:
        """Return the feed-forward network of part `index` that is solved together, if there is one."""
        return self.networks[index] if self.networks and index < len(self.networks) else None


def make_plan(
    model: nn.Module, pattern: PatternLike, patterns: Mapping[str, PatternLike | None] | None, include: Choice, exclude: Choice
) -> Plan:
    """Choose the linears to prune. See `sparsekern.prune` for the arguments.

    Raises:
        TypeError: an argument of another type.
        ValueError: no linears; experts of an unknown layout without `include`; a glob that matches nothing; features not divisible by M; a NaN or Inf weight; a weight that is tied
            to another that is not pruned; weights on more than one device.
    """
    if is_packed(model):
        raise ValueError("model: its linears are packed; sparsekern.unpack(model) makes them dense again")
    blocks = find_blocks(model)
    if include is None:
        check_experts(blocks)
    inside = [_with_weights(find_linears(block, blocks.block_name(i))) for i, block in enumerate(blocks.modules)]
    in_blocks = {linear.name for linears in inside for linear in linears}
    outside = [linear for linear in _with_weights(find_linears(model)) if linear.name not in in_blocks]
    everything = [linear.name for linears in inside for linear in linears] + [linear.name for linear in outside]

    linears = [linear for part in (*inside, outside) for linear in part]
    included = _chosen("include", include, linears)
    excluded = _chosen("exclude", exclude, linears)
    default = parse_pattern(pattern)
    by_glob = {glob: None if value is None else parse_pattern(value) for glob, value in (patterns or {}).items()}
    check_matches("patterns", by_glob, everything)
    by_default = {linear.name for linears, chosen in zip(inside, blocks.by_default, strict=True) for linear in linears if chosen}
    # A linear outside the blocks is pruned only where its whole name is given, a tower beside a language model where it is included.
    eligible = by_default if include is None else in_blocks
    if include is not None and not callable(include):
        eligible = in_blocks | set(as_globs("include", include) or ())
    gates = {
        linear.name
        for index, block in enumerate(blocks.modules)
        for linear in find_gates(block, inside[index], blocks.block_name(index))
    }
    # Fewer inputs than a group has: the step of a state-space mixer is such a matrix.
    patterned = ((linear, first_match(linear.name, by_glob, default)) for part in inside for linear in part)
    gates |= {linear.name for linear, found in patterned if isinstance(found, NM) and linear.features < found.m}
    asked = (
        [included or set()] if callable(include) else [_matching(glob, everything) for glob in as_globs("include", include) or ()]
    )
    asked += [_matching(glob, everything) for glob, value in by_glob.items() if value is not None]
    gates.difference_update(*(names for names in asked if names <= gates))

    def chosen(linear: Linear) -> bool:
        name = linear.name
        wanted = name in eligible and (included is None or name in included) and name not in (excluded or ())
        return wanted and first_match(name, by_glob, default) is not None

    spared = [linear.name for linear in linears if linear.name in gates and chosen(linear)]
    eligible = eligible - gates
    plan = Plan(
        blocks,
        tuple(tuple(filter(chosen, linears)) for linears in inside),
        tuple(filter(chosen, outside)),
        {name: found for name in everything if (found := first_match(name, by_glob, default)) is not None},
    )
    if not plan.linears:
        raise ValueError("include, exclude, patterns: together they leave no linear to prune")
    kept = {linear.name: plan.patterns[linear.name] for linear in plan.linears}
    lists = [name for index, block in enumerate(blocks.modules) for name in listed_experts(block, blocks.block_name(index))]
    listed = frozenset(name for name in kept if name.startswith(tuple(f"{owner}." for owner in lists)))
    plan = replace(plan, patterns=kept, listed=listed)
    _check_ties(model, plan.linears)
    check_device(model)
    for linear in plan.linears:
        kept[linear.name].check_features(linear.features, linear.name)
        check_finite(linear)
    say_what_stays_dense(blocks, inside)
    planned = [(block, blocks.block_name(i)) for i, block in enumerate(blocks.modules) if plan.block_linears[i]]
    bare = [name for block, prefix in planned for name in bare_routers(block, prefix)]
    if spared or bare:
        hint = "a glob of include or patterns that matches nothing else prunes them" if spared else "they are not linear layers"
        warnings.warn(
            f"{shortened(spared + bare)}: router gates and other small matrices stay dense; {hint}",
            SparsekernWarning,
            stacklevel=3,
        )
    if include is None:
        say_which_stacks_stay_dense(blocks)
    return plan


def plan_linears(model: nn.Module, method: LinearMethod | GradualMethod, request: Request) -> Plan:
    """Return the linears that `request` chooses, with the patterns that `method` allocates.

    Raises:
        TypeError: see `make_plan`.
        ValueError: see `make_plan`; also a format that no linear is sure to fit, or patterns that the method refuses.
    """
    plan = make_plan(model, request.default_pattern, request.patterns, request.include, request.exclude)
    if request.saves:
        check_format_fits(model, plan.patterns, request.format)
    return allocated(model, method, plan)


def allocated(model: nn.Module, method: LinearMethod | GradualMethod, plan: Plan) -> Plan:
    """Return the plan with the patterns that `method` allocates.

    Raises:
        ValueError: the method refuses the patterns.
    """
    return replace(plan, patterns=method.allocate(planned_blocks(model, plan), plan.patterns))


def planned_blocks(model: nn.Module, plan: Plan, names: Collection[str] | None = None) -> list[PlannedBlock]:
    """Return the linears to prune, block by block, for a method's `allocate`.

    Args:
        model: the model.
        plan: the linears to prune.
        names: the names of the linears to return; None returns all.
    """
    parts = [[linear for linear in linears if names is None or linear.name in names] for linears in plan.parts]
    blocks = [PlannedBlock(linears, partial(_units, model, plan.blocks, index)) for index, linears in enumerate(parts[:-1])]
    return [*blocks, PlannedBlock(parts[-1])]


def _units(model: nn.Module, blocks: Blocks, index: int) -> list[Units]:
    if is_encoder(model):
        raise ValueError(
            f"model: expected a decoder, whose heads and neurons can become zero, got the encoder {type(model).__name__}; "
            "KPrune removes its units"
        )
    return find_units(model, find_linears(blocks.modules[index], blocks.block_name(index)))


def _chosen(argument: str, choice: Choice, linears: list[Linear]) -> set[str] | None:
    """Return the names of the linears that globs or a callable choose; None for no choice.

    Raises:
        TypeError: neither names nor a callable, or a callable that returns no bool.
        ValueError: a glob that matches nothing, or a callable that raises.
    """
    if not callable(choice):
        globs = as_globs(argument, choice)
        check_matches(argument, globs, [linear.name for linear in linears])
        return None if globs is None else {linear.name for linear in linears if matches(linear.name, globs)}
    found = set()
    for linear in linears:
        try:
            answer = choice(linear.name, linear.modules[0])
        except Exception as error:
            raise ValueError(f"{argument}: the callable raised {type(error).__name__} for {linear.name}: {error}") from error
        if not isinstance(answer, bool):
            raise TypeError(f"{argument}: expected the callable to return True or False for {linear.name}, got {answer!r}")
        if answer:
            found.add(linear.name)
    return found


def _matching(glob: str, names: list[str]) -> set[str]:
    """Return those of `names` that a glob matches."""
    return {name for name in names if matches(name, [glob])}


def _with_weights(linears: list[Linear]) -> list[Linear]:
    """Return the linears that still have weights: removal may have cut all of them."""
    return [linear for linear in linears if linear.weight.numel()]


def _check_ties(model: nn.Module, linears: list[Linear]) -> None:
    """Raise `ValueError` unless each weight is pruned once, and is tied to nothing but the chosen linears."""
    keys = {linear.key: linear.name for linear in linears}
    if len(keys) < len(linears):
        names = ", ".join(linear.name for linear in linears if keys[linear.key] != linear.name)
        raise ValueError(f"{names}: shares its weight with a linear of another block, which block-by-block pruning cannot do")
    holders = {module for linear in linears for module in linear.holders}
    chosen = {id(linear.parameter): linear.name for linear in linears}
    for name, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in chosen and module not in holders:
                raise ValueError(
                    f"{chosen[id(parameter)]}: its weight is tied to {name}.{own_name}, which pruning would change too; "
                    "leave it out, or untie the two first"
                )


def check_device(model: nn.Module) -> None:
    """Raise `ValueError` unless all parameters are on one device."""
    devices = sorted({str(parameter.device) for parameter in model.parameters() if not is_unread(parameter)})
    if len(devices) > 1:
        raise ValueError(f"model: expected all weights on one device, got {', '.join(devices)}")


def check_finite(linear: Linear) -> None:
    """Raise `ValueError` that names the linear and the first NaN or Inf of its weight, if there is one.

    A weight of a streamed model that is not in memory passes. It is checked when its block is pruned.
    """
    if is_unread(linear.parameter):
        return
    low, high = linear.weight.aminmax()
    if not torch.isfinite(high - low):
        where = (~torch.isfinite(linear.weight)).nonzero()
        if len(where):
            row, column = (int(i) for i in where[0])
            raise ValueError(
                f"{linear.name}: expected finite weights, got {float(linear.weight[row, column])} at [{row}, {column}]"
            )
