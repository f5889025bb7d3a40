"""The bodies of the CUDA kernels, run on this CPU as fibers (csrc/testing/simt) under AddressSanitizer and UBSan.

The kernels' own files and their torch wrappers are compiled as they are, and every test under tests/ops runs on them.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import sanitizers, simt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(sanitizers.compiler()[0]) is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    sanitizers.runtime_libraries()
    return sanitizers.copy_package(tmp_path_factory.mktemp("simt"))


ORDERS = ("forward", "reversed")


@pytest.fixture(scope="module")
def op_tests(package) -> dict[str, subprocess.CompletedProcess]:
    """The op tests with threads run in either order, both at once."""
    library = simt.build_library()

    def run(order: str) -> subprocess.CompletedProcess:
        options = ("--kernels=cuda", f"--simt-library={library}")
        return sanitizers.run_op_tests(package, *options, SPARSEKERN_SIMT_ORDER=order)

    with ThreadPoolExecutor(len(ORDERS)) as pool:
        return dict(zip(ORDERS, pool.map(run, ORDERS), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_op_tests_pass_on_the_cuda_kernels(op_tests, order):
    result = op_tests[order]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


MIRROR = """
for features in (1, 31, 32, 33, 64, 97):
    lower = torch.randn(features, features).tril()
    gram = lower + torch.full_like(lower, float("nan")).triu(1)
    torch.ops.sparsekern_cuda.gram_symmetrize_(gram)
    assert torch.equal(gram, lower + lower.tril(-1).T), f"wrong at {features}"
"""

SELECT = """
scores = torch.randn(3, 4000)  # rows for a block of several warps
mask, status = torch.ops.sparsekern_cuda.topk_mask(scores, 1500, "row")
expected = torch.zeros_like(mask).scatter_(1, scores.topk(1500, dim=1).indices, True)
assert torch.equal(mask, expected), "wrong mask"
"""


SYMMETRIZE, TOPK = "gram_symmetrize.cu", "topk_mask.cu"
PROGRAMS = {SYMMETRIZE: MIRROR, TOPK: SELECT}
INLINED = {TOPK: "select.cuh"}  # the header that holds the kernel's barriers and sums, so that faults can be planted there
BARRIER = "  __syncthreads();\n"
CLEARED = "  bins.clear();\n"
SCAN = "  Count before = block_scan<kThreads>(sum, scratch.scan).before;\n"


@pytest.fixture
def planted(sanitized_python, tmp_path):
    """A function that runs a kernel with a fault planted into it."""
    return functools.partial(run_planted, sanitized_python, tmp_path)


def run_planted(
    sanitized_python: sanitizers.Interpreter, folder: Path, kernel: str, whole: str, broken: str
) -> subprocess.CompletedProcess:
    source = (simt.CSRC / "cuda" / kernel).read_text()
    if header := INLINED.get(kernel):
        text = (simt.CSRC / "cuda" / header).read_text().replace("#pragma once\n", "")
        source = source.replace(f'#include "cuda/{header}"\n', text)
    assert source.count(whole) == 1
    (folder / kernel).write_text(source.replace(whole, broken))
    library = simt.build_library(folder / "_C_simt.so", {kernel: folder / kernel})
    return sanitized_python.run(folder, f"import torch\ntorch.ops.load_library({str(library)!r})\n{PROGRAMS[kernel]}")


@pytest.mark.parametrize("kernel", PROGRAMS)
def test_the_unbroken_kernel_passes_where_faults_are_planted(planted, kernel):
    done = planted(kernel, "namespace {\n", "namespace {\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kernel, whole, broken, noticed",
    [
        (SYMMETRIZE, BARRIER, "", "wrong at"),
        (SYMMETRIZE, "column < features && row < column", "row < column", "AddressSanitizer: heap-buffer-overflow"),
        (SYMMETRIZE, "features && column <= row)", "features && column <= row && (__syncthreads(), true))", "while others wait"),
        (SYMMETRIZE, BARRIER, BARRIER + "  if (threadIdx.x < 31) __shfl_sync(~0u, 1, 0);\n", "has left the kernel"),
        (SYMMETRIZE, BARRIER, BARRIER + "  if (threadIdx.x < 31) __syncwarp(); else __syncthreads();\n", "deadlock"),
        (TOPK, CLEARED + BARRIER, CLEARED, "wrong mask"),
        (TOPK, SCAN, "  if (threadIdx.x == 77) return {};\n" + SCAN, "has left the kernel"),
        (TOPK, SCAN, "  Count before = warp_inclusive_scan(sum) - sum;\n", "wrong mask"),
    ],
    ids=[
        *("race: missing barrier", "out of bounds", "divergent barrier", "missing lane", "warp against block"),
        *("race over shared memory", "a thread leaves a sum", "a sum over too few"),
    ],
)
def test_a_planted_fault_is_found(planted, kernel, whole, broken, noticed):
    done = planted(kernel, whole, broken)
    assert done.returncode != 0 and noticed in done.stderr, done.stderr
