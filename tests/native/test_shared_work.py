"""Kernels whose work is cut into the smallest pieces, done last to first: the results are those of one piece, to the bit.

csrc/testing/split_work.c stands in for torch's thread pool, so no race and no machine decides what is found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.ops._registry import NAMESPACE, OPS
from tests.conftest import COMPILED
from tests.ops.large_samples import LARGE

from .sanitizers import ROOT

pytestmark = pytest.mark.skipif(
    not COMPILED or shutil.which("cc") is None, reason="needs sparsekern._C, and a C compiler for what stands in for threads"
)

PROGRAM = """
import copy, ctypes, json, sys, torch
from sparsekern.ops._registry import OPS
from tests.ops.large_samples import LARGE

pool = ctypes.CDLL(sys.argv[1])
pool.most_pieces_since_last_call.restype = ctypes.c_int64

def call(op, sample):
    result = op.overload(*sample.args, **sample.kwargs)
    returned = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    tensors = returned + [value for value in sample.args if isinstance(value, torch.Tensor)]
    return [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]

found = {}
for name, make in LARGE.items():
    sample = make(torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    expected = call(OPS[name], copy.deepcopy(sample))
    pool.most_pieces_since_last_call()
    torch.set_num_threads(3)
    got = call(OPS[name], copy.deepcopy(sample))
    found[name] = pool.most_pieces_since_last_call(), all(map(torch.equal, got, expected))
print(json.dumps(found))
"""


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[int, bool]]:
    """The most pieces of each op's work, and whether the results were equal."""
    library = tmp_path_factory.mktemp("split") / "libsplit_work.so"
    source = Path(ROOT) / "csrc" / "testing" / "split_work.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_has_a_large_sample():
    assert set(LARGE) == {name for name in OPS if has_kernel(name)}


def test_the_work_of_every_large_sample_is_shared(found):
    assert {name: pieces for name, (pieces, _) in found.items() if pieces < 2} == {}


def test_pieces_and_their_order_do_not_change_the_result(found):
    assert [name for name, (_, equal) in found.items() if not equal] == []
