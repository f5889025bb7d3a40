"""The op tests once more, through kernels that are built with AddressSanitizer and UndefinedBehaviorSanitizer.

The real library is built (not a harness around it), beside a copy of the package, so every test under tests/ops counts here too.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import COMPILED

from .sanitizers import BUILD, ROOT, copy_package, run_op_tests, runtime_libraries

LIBRARY = BUILD / "asan"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILED, reason="sparsekern._C is not built, so there are no kernels to sanitize"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A folder with the package, its tests and the sanitized library."""
    runtime_libraries()
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={LIBRARY / 'lib'}", f"--build-temp={LIBRARY / 'temp'}"]
    environment = {**os.environ, "DEBUG": "asan", "SPARSEKERN_BUILD": "1", "SPARSEKERN_CUDA": "0"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    folder = copy_package(tmp_path_factory.mktemp("sanitized"))
    shutil.copy(LIBRARY / "lib" / "sparsekern" / "_C.so", folder / "sparsekern")
    return folder


def test_op_tests_pass_with_sanitized_kernels(sanitized):
    result = run_op_tests(sanitized)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


@pytest.fixture
def python(sanitized_python, sanitized):
    """A function that runs a program with the sanitized library."""
    return functools.partial(sanitized_python.run, sanitized)


FAULT = """
import ctypes, torch, sparsekern._C
library = ctypes.CDLL(sparsekern._C.__file__)
data = torch.zeros(24, dtype=torch.uint8)
library.sparsekern_read_past.argtypes = [ctypes.c_void_p, ctypes.c_int64]
{call}
"""


def test_a_planted_read_past_the_end_of_a_tensor_is_caught(python):
    inside = python(FAULT.format(call="library.sparsekern_read_past(data.data_ptr(), 23)"))
    assert inside.returncode == 0, inside.stderr
    outside = python(FAULT.format(call="library.sparsekern_read_past(data.data_ptr(), 24)"))
    assert outside.returncode != 0 and "heap-buffer-overflow" in outside.stderr


def test_a_planted_overflow_is_caught(python):
    result = python(FAULT.format(call="library.sparsekern_overflow(2**31 - 1)"))
    assert result.returncode != 0 and "signed integer overflow" in result.stderr


# Every pivot of a float32 factor is called too small, and none of a float64 one.
LAST_RESORT = """
import ctypes, math, torch, sparsekern._C
factorise = ctypes.CDLL(sparsekern._C.__file__).sparsekern_reverse_cholesky
factorise.restype = ctypes.c_double
factorise.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_double, ctypes.c_void_p]

def factored(gram, damping, smallest_pivot=2 / torch.finfo(torch.float32).eps):
    factor = torch.full_like(gram, math.nan)
    used = factorise(gram.data_ptr(), len(gram), damping, smallest_pivot, factor.data_ptr())
    return factor.double(), used

for features in (1, 17, 67):
    x = torch.randn(3 * features, features, generator=torch.Generator().manual_seed(features))
    x[:, 5:features:20] = 0
    gram = x.T @ x
    dead = gram.diagonal() == 0
    for damping in (0.0, 0.01):
        factor, used = factored(gram.tril() + torch.full_like(gram, math.nan).triu(1), damping)
        shift = damping * gram.diagonal().double().mean()
        assert used == (-damping or -math.inf), used
        assert (factor.tril(-1) == 0).all() and (factor.diagonal()[dead] == -shift.sqrt().float()).all()
        alive = factor[~dead][:, ~dead]
        expected = gram.double()[~dead][:, ~dead] + shift * torch.eye(len(alive))
        assert torch.allclose(alive @ alive.T, expected, rtol=1e-6, atol=1e-6), features
        assert factored(gram, damping, 0.0)[1] == damping
"""


def test_float64_as_the_last_resort(python):
    result = python(LAST_RESORT)
    assert result.returncode == 0, result.stderr
