"""Exceptions of one process as text, and back again as exceptions of the same class in all processes."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ValueError, TypeError, KeyError, IndexError, ArithmeticError, NotImplementedError, RuntimeError, MemoryError),
        *(FileExistsError, FileNotFoundError, PermissionError, OSError),  # made with a text alone
    )
}

REMEDY = (
    "blocks that are finished are kept in out: start the same command with --resume (resume=True), with 1, 2, 4 or as many processes "
    "as divide the leaves"
)


def as_text(error: BaseException) -> dict[str, Any]:
    """Return what `shared` makes the exception from, as values that JSON can hold."""
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else str(error.filename)
        return {"kind": "OSError", "errno": error.errno, "text": error.strerror or str(error), "file": name}
    return {"kind": _kind(error), "text": str(error), "class": type(error).__name__}


def _kind(error: BaseException) -> str:
    return next(
        (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in KINDS and KINDS[kind.__name__] is kind), "RuntimeError"
    )


def shared(failures: Sequence[Mapping[str, Any] | None]) -> Exception:
    """Return the exception for all processes.

    Args:
        failures: for each rank, its exception as text; None where it has none. At least one has.

    Returns:
        The exception of the lowest rank that failed. The message names the rank, unless all failed alike.
    """
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure is not None)
    whose = "" if all(other == failure for other in failures) else f"rank {rank}: "
    text = str(failure["text"])
    if "errno" in failure:
        number = int(failure["errno"])
        return OSError(number, f"{whose}{text}", failure["file"])
    kind = KINDS[failure["kind"]]
    own = failure["class"]
    if own != kind.__name__ and kind is RuntimeError:
        text = f"{own}: {text}" if text else own
    return kind(f"{whose}{text}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from or because of."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def lost(rank: int, error: BaseException) -> OSError:
    """Return the exception for a process that ended or cannot be reached."""
    return _end(f"rank {rank} ended or cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__})")


def silence(why: str) -> OSError:
    """Return the exception for ranks that cannot exchange anything any more."""
    return ConnectionError(errno.ECONNRESET, why) if REMEDY in why else _end(why)


def _end(what: str) -> OSError:
    return ConnectionError(errno.ECONNRESET, f"{what}; {REMEDY}")
