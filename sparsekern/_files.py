"""Files that are there whole or not at all, and folders that one call works on at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, force it to disk and rename it: a crash leaves the old file or the new one.

    Raises:
        OSError: with what was being written where there is no space left; `path` is then as it was.
    """
    replace_atomically(path, lambda temporary: temporary.write_bytes(data), f"{len(data):,} bytes")


def replace_atomically(path: Path, write: Callable[[Path], object], what: str = "a file") -> None:
    """The same for whatever `write` puts into the file that it is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left while writing {what}; what was written before is intact"
            raise OSError(error.errno, message, str(path)) from error
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` within; the system releases it also when the process dies. Where it knows no such locks, nothing is held.

    Raises:
        ValueError: another call holds it; the message begins with `what`.
    """
    with open(path, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{what} is in use by another process or call; wait until it is done") from error
        yield


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
