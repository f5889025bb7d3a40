"""What a run does to glibc's heap: it keeps what is freed while it lasts, or none of it within a limit, and gives it back when it ends."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# MiB that the heap has more than before, from the system, in a process of its own: without tensors, so that nothing else is freed in between.
PROGRAM = """
import ctypes, json
from sparsekern.pruning.host_memory import freed_memory_kept, freed_memory_returned

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Heap, ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def held():
    return libc.mallinfo2().arena >> 20

def held_after_use():
    blocks = [libc.malloc(16 << 20) for _ in range(16)]
    for block in blocks:
        libc.free(block)
    return held()

before = held()
with freed_memory_kept():
    within = held_after_use()
after, later = held(), held_after_use()
now = held()
with freed_memory_returned():
    blocks = [libc.malloc(1 << 20) for _ in range(256)]
    limited = held() - now  # in the heap itself, which keeps what is freed between other pieces
    for block in blocks:
        libc.free(block)
print(json.dumps([within - before, after - before, later - before, limited]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc, so nothing is done")
def test_freed_memory_is_given_back_when_the_run_ends():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    within, after, later, limited = json.loads(done.stdout)
    assert within >= 256 - 64
    assert after < 64, "the run's memory stays with the process"
    assert later < 128, "memory that is freed after the run stays with the process"
    assert limited < 16, "a run within a limit leaves freed memory in the heap"
