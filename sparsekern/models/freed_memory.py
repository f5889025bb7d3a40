"""The C library's memory, given back to the system once a block of a streamed model is released.

The C library keeps what is freed for later allocations of a thread. Blocks are read in one thread and released in another, so that the
memory of many blocks would stay with the process.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache


def give_back() -> None:
    """Give freed memory back to the system. Without glibc, do nothing."""
    if libc := glibc():
        libc.malloc_trim(0)


@cache
def glibc() -> ctypes.CDLL | None:
    """Return glibc, or None where the process runs on another C library."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
