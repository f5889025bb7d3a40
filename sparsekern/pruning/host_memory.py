"""Freed memory kept in the process while a model runs on the CPU, or returned to the system at once where memory is limited.

glibc returns the pages of every large activation to the system when it is freed. It then faults in zeroed pages for the next one of
the same size. This takes an eighth of the time of a small model's forward. What is kept, on the other hand, is not all of use again:
between pieces that are in use it may lie idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..models.freed_memory import give_back, glibc
from .process import PutBack

# mallopt's parameters and limits, from malloc.h and malloc/malloc.c of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
SMALLEST_MMAP_THRESHOLD = 128 << 10  # with which a process begins
NEVER = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process within, and return it to the system afterwards. Do nothing without glibc.

    Afterwards the thresholds have the values that glibc's own adjustment reaches once large tensors have been freed.
    """
    libc = glibc()
    if libc is None:
        yield
        return
    with _allocator.kept(None):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        yield


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return the memory of tensors to the system as soon as they are freed within. Do nothing without glibc.

    The memory that the process has is then that of the tensors which are in use.
    """
    libc = glibc()
    if libc is None:
        yield
        return
    with _allocator.kept(None):
        libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * SMALLEST_MMAP_THRESHOLD)
        yield


def _give_back() -> None:
    if libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        give_back()


_allocator: PutBack[None, None] = PutBack(lambda _: None, lambda *_: _give_back())
