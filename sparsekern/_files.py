"""Files that are written whole or not at all, and folders that one call works on at a time."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_numbers = itertools.count()  # two threads may write one path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, force it to disk and rename it.

    A crash leaves the old file or the new one.

    Raises:
        OSError: naming what was being written where there is no space left; `path` is unchanged then.
    """
    replace_atomically(path, lambda temporary: temporary.write_bytes(data), f"{len(data):,} bytes")


def replace_atomically(path: Path, write: Callable[[Path], object], what: str = "a file") -> None:
    """Replace `path` by what `write` puts into the file that it is given, as `write_atomically` does.

    Args:
        path: the file to make or replace.
        write: is called with a path beside `path`, which does not exist yet.
        what: names the content in the error where there is no space left.

    Raises:
        OSError: as `write_atomically` does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask, or the folder's default ACL, has it
        write(temporary)
        temporary.chmod(mode)  # safetensors replaces the file by a private one
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left while writing {what}; what was written before is intact"
            raise OSError(error.errno, message, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors raises for the disk of `path` into an `OSError` with its number."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def is_temporary(name: str) -> bool:
    """Return whether a file of that name is one that a killed `replace_atomically` (or safetensors inside it) leaves."""
    return name.startswith(".") and (name.endswith(".tmp") or name.startswith(".tmp"))


def remove_temporary(folder: Path) -> None:
    """Remove the files that killed calls left in `folder`, which the caller holds the lock of."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk. Windows has no such call for folders."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` within, and remove it afterwards; the system releases it where the process dies.

    Args:
        path: the lock file; its folder exists.
        what: names the locked thing; the messages begin with it.

    Raises:
        ValueError: another call, in this process or another, holds it.
        OSError: the file cannot be made.
    """
    from filelock import FileLock, Timeout

    in_use = f"{what} is in use by another process or call; wait until it is done"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{what} cannot be written to ({error.strerror})") from error
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(in_use) from error
        if not _is_at(descriptor, path):  # its holder finished, and removed it, after it was opened here
            raise ValueError(in_use)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
    finally:
        os.close(descriptor)
        lock.release()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
