"""What each setting of `prune` needs of a run. A setting that a run cannot give what it needs is refused in front of all work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..methods import INT4, BlockMethod, BlockTuning, Distill, LinearMethod, Method, check_choice
from ..methods.allocation import ALLOCATIONS, MIXED, UNIFORM
from ..methods.statistics import Importance
from .corrections import CORRECTIONS, NONE
from .quality import Preset


@dataclass(frozen=True)
class Run:
    """What a setting may need to know of a run.

    Attributes:
        method: the method that makes weights zero.
        is_second: True if `method` prunes what the removal of experts leaves.
        is_streamed: True if the blocks of the model are read one at a time.
        leaves: the number of parts that statistics are summed in.
        predicts: True if the model predicts next tokens.
    """

    method: Method
    is_second: bool = False
    is_streamed: bool = False
    leaves: int = 1
    predicts: bool = True


class Need(NamedTuple):
    """What a run must be.

    Attributes:
        met: returns whether a run is.
        otherwise: says what another run is, behind the value that is expected there. It may name `{method}` and `{leaves}`.
    """

    met: Callable[[Run], bool]
    otherwise: str


class Setting(NamedTuple):
    """An argument of `prune` that needs something of the run.

    Attributes:
        neutral: the value that needs nothing.
        kind: the names that it accepts, or the class of its configs.
        needs: what any other value needs.
    """

    neutral: str | None
    kind: tuple[str, ...] | type
    needs: tuple[Need, ...]


def _solves_one_linear_at_a_time(run: Run) -> bool:
    return isinstance(run.method, LinearMethod) and not isinstance(run.method, BlockMethod)


def _takes_inputs_alone(run: Run) -> bool:
    needs = getattr(run.method, "needs", None)
    return needs is None or not issubclass(needs, Importance)


def _prunes_to_shares(run: Run) -> bool:
    return isinstance(run.method, LinearMethod) and not run.method.needs_whole_model


ONE_LINEAR = Need(_solves_one_linear_at_a_time, "for {method}, which does not solve one linear at a time")
INPUTS_ALONE = Need(_takes_inputs_alone, "for {method}, whose statistic is of a weight and its inputs together")
SHARES = Need(_prunes_to_shares, "for {method}, which does not prune each linear to a share")
MASKS = Need(lambda run: isinstance(run.method, LinearMethod), "for {method}, which leaves no masks block by block")
FIRST = Need(
    lambda run: not run.is_second, "for {method} behind the removal of experts, which leaves no dense model to compare with"
)
ONE_PART = Need(lambda run: run.leaves == 1, "for sums in {leaves} parts (several processes, or leaves; run one)")
IN_MEMORY = Need(
    lambda run: not run.is_streamed,
    "for a streamed model, whose blocks are not in memory together (load it without stream=True)",
)
PREDICTS = Need(lambda run: run.predicts, "for a model that predicts no next tokens")

SETTINGS = {
    "correction": Setting(NONE, CORRECTIONS, (ONE_LINEAR, INPUTS_ALONE)),
    "tune": Setting(None, BlockTuning, (MASKS,)),
    "distill": Setting(None, Distill, (MASKS, FIRST, PREDICTS, IN_MEMORY)),
    "allocation": Setting(UNIFORM, ALLOCATIONS, (SHARES, PREDICTS)),
    "values": Setting(None, (INT4,), (ONE_PART,)),
}
OPTIONAL = ("allocation", "tune", "distill")  # what a quality can do without
PAIR_OF_BLOCKS = (ONE_PART, IN_MEMORY)  # what two blocks that are tuned together need


def check_settings(given: Mapping[str, object], run: Run) -> None:
    """Raise unless a run can do what its settings ask for.

    Args:
        given: the values of `SETTINGS`, by name.
        run: the run.

    Raises:
        TypeError: a setting is no config of its class.
        ValueError: a setting has an unknown name for a value, or needs what the run is not.
    """
    for name, setting in SETTINGS.items():
        _check_kind(name, setting, given[name])
    for name, setting in SETTINGS.items():
        value = given[name]
        if value != setting.neutral and (otherwise := _unmet(setting.needs, run)):
            shown = repr(value) if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{name}: expected {setting.neutral!r} {otherwise}, got {shown}")
    if given["allocation"] == MIXED and given["values"] is not None:
        raise ValueError(
            f"values: expected None for allocation={MIXED!r}, which chooses patterns that 4 bits have no format for, got {given['values']!r}"
        )
    tune = given["tune"]
    for need in PAIR_OF_BLOCKS if isinstance(tune, BlockTuning) and tune.blocks == 2 else ():
        if not need.met(run):
            raise ValueError(f"BlockTuning.blocks: expected 1 {need.otherwise.format(leaves=run.leaves)}, got 2")


def without_unmet(chosen: Preset, given: Preset, run: Run) -> tuple[Preset, list[str]]:
    """Return what a quality chose without those of `OPTIONAL` that the run cannot give what they need, and a reason for each.

    Args:
        chosen: the settings that the quality chose.
        given: those that were given besides; they stay, and are refused later.
        run: the run.
    """
    reasons = []
    for name in OPTIONAL:
        setting = SETTINGS[name]
        asked = getattr(given, name) != setting.neutral
        otherwise = _unmet(setting.needs, run)
        if getattr(chosen, name) != setting.neutral and not asked and otherwise:
            neutral: Any = setting.neutral
            chosen = replace(chosen, **{name: neutral})
            reasons.append(f"{name} {otherwise}")
    return chosen, reasons


def _unmet(needs: Iterable[Need], run: Run) -> str:
    """Return what the run is in place of what is needed; an empty text if it gives all of it."""
    found = next((need.otherwise for need in needs if not need.met(run)), "")
    return found.format(method=type(run.method).__name__, leaves=run.leaves)


def _check_kind(name: str, setting: Setting, value: object) -> None:
    if isinstance(setting.kind, tuple):
        check_choice(name, value, setting.kind if setting.neutral in setting.kind else (setting.neutral, *setting.kind))
    elif value is not None and not isinstance(value, setting.kind):
        raise TypeError(f"{name}: expected a config such as {setting.kind.__name__}(), or None, got {value!r}")
