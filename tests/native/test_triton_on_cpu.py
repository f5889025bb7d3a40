"""The Triton kernels in Triton's interpreter, in a process of its own: every test under tests/ops, and those of tests/triton_kernels."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from . import sanitizers

pytest.importorskip("triton", reason="Triton kernels need triton")

pytestmark = pytest.mark.slow


SWEEP = "tests/ops/test_obs_sweep.py"  # as long as all others together, so it runs beside them
PARTS = ((SWEEP,), ("tests/ops", "tests/triton_kernels", f"--ignore={SWEEP}"))


def test_op_tests_pass_on_the_triton_kernels(tmp_path):
    package = sanitizers.copy_package(tmp_path)
    # torch's threads and instruction sets have no part in these kernels, and gradients are other ops.
    options = ("--kernels=triton", "-k", f"{sanitizers.NOT_AGAIN} and not threads and not isa_that and not gradients")

    def run(tests: tuple[str, ...]) -> subprocess.CompletedProcess:
        return sanitizers.run_op_tests(package, *options, tests=tests, TRITON_INTERPRET="1", LD_PRELOAD="")

    with ThreadPoolExecutor(len(PARTS)) as pool:
        for result in pool.map(run, PARTS):
            assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
