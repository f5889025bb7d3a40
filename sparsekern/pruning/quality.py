"""Names for whole settings of `prune`, by how much time they take for how good a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..methods import BlockTuning, Distill, Method, resolve_method
from ..methods.allocation import FISHER, MIXED, UNIFORM
from ..pattern import Pattern, Unstructured
from .corrections import DENSE, NONE

DEFAULT_METHOD = "sparsegpt"
FAST, GOOD, BEST = "fast", "good", "best"


@dataclass(frozen=True)
class Preset:
    """Settings of `prune`, by the names of its arguments."""

    method: str | Method = DEFAULT_METHOD
    correction: str = NONE
    allocation: str = UNIFORM
    tune: BlockTuning | None = None
    distill: Distill | None = None


PRESETS = {
    FAST: Preset("sparsegpt"),
    GOOD: Preset("alps", DENSE),
    BEST: Preset("alps", DENSE, FISHER, BlockTuning(), Distill()),
}


def with_quality(quality: str | None, pattern: Pattern | None, method: str | Method | None, given: Preset) -> Preset:
    """Return the settings that `quality` stands for, or those given where it is None.

    Settings of a training that are given replace those of `quality`, or add to them. So does a config of the method that it names.

    Args:
        quality: a key of `PRESETS`, or None.
        pattern: the requested pattern. Zeros are shared out among linears only where it is a share.
        method: the method that is asked for; None for none.
        given: the settings that are given besides.

    Raises:
        ValueError: an unknown name, or what is given besides contradicts it.
    """
    if quality is None:
        return given if method is None else replace(given, method=method)
    if quality not in PRESETS:
        raise ValueError(f"quality: expected one of {', '.join(map(repr, PRESETS))} or None, got {quality!r}")
    found = PRESETS[quality]
    if found.allocation == FISHER and given.allocation == MIXED:
        found = replace(found, allocation=MIXED)
    elif not isinstance(pattern, Unstructured):
        found = replace(found, allocation=UNIFORM)
    own = {"correction": given.correction, "allocation": given.allocation}
    other = [name for name, value in own.items() if value not in (getattr(Preset(), name), getattr(found, name))]
    if method is not None and type(resolve_method(method)) is not type(resolve_method(found.method)):
        other.insert(0, "method")
    if other:
        raise ValueError(f"quality: expected None beside {other[0]}, which it chooses, got {quality!r}")
    more: dict[str, Any] = {"method": method, "tune": given.tune, "distill": given.distill}
    return replace(found, **{name: value for name, value in more.items() if value is not None})
