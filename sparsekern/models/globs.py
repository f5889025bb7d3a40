"""Names and globs, such as `"*.mlp.*"`, that choose among a model's linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

Globs = str | Iterable[str] | None
T = TypeVar("T")


def as_globs(argument: str, globs: Globs) -> list[str] | None:
    """Return names or globs as a list, None unchanged; raise `TypeError` for anything else."""
    if globs is None:
        return None
    if not isinstance(globs, Iterable):
        raise TypeError(f"{argument}: expected names or globs, got {globs!r}")
    globs = [globs] if isinstance(globs, str) else list(globs)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument}: expected names or globs, got {glob!r}")
    return globs


def check_matches(argument: str, globs: Iterable[str] | None, names: Sequence[str]) -> None:
    """Raise `ValueError` for a glob that matches none of `names`, which is a mistake rather than a choice."""
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in names):
            like = f" (they are named like {names[0]!r})" if names else ""
            raise ValueError(f"{argument}: {glob!r} matches no linear of the model{like}")


def matches(name: str, globs: Iterable[str] | None) -> bool:
    """Return whether one of `globs` matches the name."""
    return any(fnmatchcase(name, glob) for glob in globs or ())


def first_match(name: str, by_glob: Mapping[str, T], default: T) -> T:
    """Return the value of the first glob that matches the name, or `default` where none does."""
    return next((value for glob, value in by_glob.items() if fnmatchcase(name, glob)), default)
