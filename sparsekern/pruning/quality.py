"""Names for whole settings of `prune`, by how much time they take for how good a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..methods import BlockTuning, Method
from ..methods.allocation import FISHER, UNIFORM
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


PRESETS = {
    FAST: Preset("sparsegpt"),
    GOOD: Preset("alps", DENSE),
    BEST: Preset("alps", DENSE, FISHER, BlockTuning()),
}


def with_quality(quality: str | None, pattern: Pattern | None, method: str | Method | None, given: Preset) -> Preset:
    """Return the settings that `quality` stands for, or those given where it is None.

    Args:
        quality: a key of `PRESETS`, or None.
        pattern: the requested pattern. Zeros are shared out among linears only where it is a share.
        method: the method that is asked for; None for none.
        given: the settings that are given besides.

    Raises:
        ValueError: an unknown name, or a setting that `quality` chooses is given besides it.
    """
    if quality is None:
        return given if method is None else replace(given, method=method)
    if quality not in PRESETS:
        raise ValueError(f"quality: expected one of {', '.join(map(repr, PRESETS))} or None, got {quality!r}")
    plain = vars(Preset())
    other = [name for name, value in vars(given).items() if value != plain[name]]
    if method is not None or other:
        raise ValueError(
            f"quality: expected None beside {'method' if method is not None else other[0]}, which it chooses, got {quality!r}"
        )
    found = PRESETS[quality]
    return found if isinstance(pattern, Unstructured) else replace(found, allocation=UNIFORM)
