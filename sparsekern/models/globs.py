"""Names and globs, such as `"*.mlp.*"`, that choose among a model's linears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

Globs = str | Iterable[str] | None


def as_globs(argument: str, globs: Globs) -> list[str] | None:
    """Raise `TypeError` for anything but a name, several names, or None."""
    if globs is None:
        return None
    globs = [globs] if isinstance(globs, str) else list(globs)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument}: expected names or globs, got {glob!r}")
    return globs


def check_matches(argument: str, globs: Iterable[str] | None, names: Sequence[str]) -> None:
    """Raise `ValueError` for a glob that matches none of `names`: a slip of the pen, not a choice."""
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"{argument}: {glob!r} matches no linear of the model (they are named like {names[0]!r})")


def matches(name: str, globs: Iterable[str] | None) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs or ())
