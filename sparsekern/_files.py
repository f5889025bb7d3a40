"""Atomic writes of files, and locks of folders."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.\d+(-\d+)?\.tmp|\.tmp[0-9A-Za-z]{6}")
_numbers = itertools.count()  # distinguishes threads that write the same path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, force it to disk and rename it.

    A crash leaves either the old file or the new one.

    Raises:
        OSError: the file cannot be written. `path` is then unchanged; if no space is left, the message names the content.
    """
    replace_atomically(path, lambda temporary: temporary.write_bytes(data), f"{len(data):,} bytes")


def replace_atomically(path: Path, write: Callable[[Path], object], what: str = "a file") -> None:
    """Replace `path` by a file that `write` makes, as atomically as `write_atomically`.

    Args:
        path: the file to make or replace.
        write: writes to the path that it is called with, an empty file beside `path`.
        what: names the content in the error if no space is left.

    Raises:
        OSError: as in `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # set by the umask or the folder's default ACL
        write(temporary)
        temporary.chmod(mode)  # safetensors replaces the file by a private one
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "the system allows no file as large" if error.errno == errno.EFBIG else "no space left"
            message = f"{why} while writing {what}; earlier files are intact"
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
    """Return whether `name` is that of a file left by a killed `replace_atomically`, or by safetensors inside it."""
    return TEMPORARY.fullmatch(name) is not None


def remove_temporary(folder: Path) -> None:
    """Remove the files that killed calls left in `folder`, whose lock the caller holds."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or the entries of a folder to disk. Windows has no such call for folders."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` inside the block, then remove it. The system releases it if the process dies.

    Args:
        path: the lock file, in a folder that exists.
        what: names the locked thing; messages begin with it.

    Raises:
        ValueError: another call holds the lock, in this process or another.
        OSError: the lock file cannot be made.
    """
    from filelock import FileLock, Timeout

    in_use = f"{what} is in use by another process or call; wait until it is done"
    try:
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)  # a link would have its target made
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
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
        except OSError as error:  # such as a full disk
            raise OSError(error.errno, f"{what} cannot be written to ({error.strerror})") from error
        if not _is_at(descriptor, path):  # the holder finished and removed the file after it was opened here
            raise ValueError(in_use)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove open files
                path.unlink()
    finally:
        os.close(descriptor)
        lock.release()


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
