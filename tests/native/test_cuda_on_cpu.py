"""The bodies of the CUDA kernels, run on this CPU as fibers (csrc/testing/simt) under AddressSanitizer and UBSan.

The kernels' own files and their torch wrappers are compiled as they are, and every test under tests/ops runs on them.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


# In reversed order, a thread reads what another should have written before: looked for where threads share their work.
SHARING = (
    *("contracts", "obs_sweep", "topk_mask", "nm_mask", "semi_structured_prune_pack", "gram_symmetrize"),
    "bitmask_linear",
)
ORDERS = {"forward": ("tests/ops",), "reversed": tuple(f"tests/ops/test_{name}.py" for name in SHARING)}


@pytest.fixture(scope="module")
def op_tests(package) -> dict[str, subprocess.CompletedProcess]:
    """The op tests with threads run in either order, both at once."""
    library = simt.build_library()

    def run(order: str) -> subprocess.CompletedProcess:
        options = ("--kernels=cuda", f"--simt-library={library}")
        return sanitizers.run_op_tests(package, *options, tests=ORDERS[order], SPARSEKERN_SIMT_ORDER=order)

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


# Without zeros: a slot holds the k-th value of two rows. One step for a warp, and none for the others.
MULTIPLY = """
weight, x = torch.randn(16, 128).bfloat16(), torch.randn(3, 128).bfloat16()
values = torch.cat((weight.view(8, 2, 128).transpose(1, 2).flatten(), torch.zeros(128).bfloat16()))
places = torch.full((16, 2), -1), torch.tensor([0, 8 * 128]), torch.arange(16, dtype=torch.int32)
y = torch.ops.sparsekern_cuda.bitmask_linear(x, values, *places, None, None)
assert torch.allclose(y.float(), x.float() @ weight.float().T, rtol=1e-2, atol=1e-2), "wrong product"
"""


SYMMETRIZE, TOPK, BITMASK = "gram_symmetrize.cu", "topk_mask.cu", "bitmask_linear.cu"
PROGRAMS = {SYMMETRIZE: MIRROR, TOPK: SELECT, BITMASK: MULTIPLY}
INLINED = {TOPK: "select.cuh"}  # the header that holds the kernel's barriers and sums, so that faults can be planted there
PLANTED = """#include <cstdlib>
namespace {
bool planted(int fault) {
  static const int chosen = std::atoi(std::getenv("PLANTED_FAULT"));
  return chosen == fault;
}
}
"""
BARRIER = "  __syncthreads();\n"
CLEARED = "  bins.clear();\n" + BARRIER
WAIT, READY = "    wait_for_copies<1>();\n", "    __syncwarp();\n#pragma unroll 1\n"
SCAN = "  Count before = block_scan<kThreads>(sum, scratch.scan).before;\n"


class Fault(NamedTuple):
    """A fault in a kernel. One build holds them all, planted in this order: those that keep the text of their place come first.

    Attributes:
        kernel: the file that is compiled.
        whole: the text of the place, which must be there once.
        broken: the text instead, with the fault where `FAULT` holds.
        noticed: what a run with the fault says.
    """

    kernel: str
    whole: str
    broken: str
    noticed: str


FAULTS = {
    "out of bounds": Fault(
        SYMMETRIZE,
        "column < features && row < column",
        "(FAULT || column < features) && row < column",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "divergent barrier": Fault(
        SYMMETRIZE,
        "features && column <= row)",
        "features && column <= row && (!FAULT || (__syncthreads(), true)))",
        "while others wait",
    ),
    "missing lane": Fault(
        SYMMETRIZE, BARRIER, BARRIER + "  if (FAULT && threadIdx.x < 31) __shfl_sync(~0u, 1, 0);\n", "has left the kernel"
    ),
    "warp against block": Fault(
        SYMMETRIZE,
        BARRIER,
        BARRIER + "  if (FAULT) { if (threadIdx.x < 31) __syncwarp(); else __syncthreads(); }\n",
        "deadlock",
    ),
    "race: missing barrier": Fault(SYMMETRIZE, BARRIER, "  if (!FAULT) __syncthreads();\n", "wrong at"),
    "race over shared memory": Fault(TOPK, CLEARED, "  bins.clear();\n  if (!FAULT) __syncthreads();\n", "wrong mask"),
    "a thread leaves a sum": Fault(TOPK, SCAN, "  if (FAULT && threadIdx.x == 77) return {};\n" + SCAN, "has left the kernel"),
    "a sum over too few": Fault(
        TOPK,
        SCAN,
        SCAN.replace("= block_scan", "= FAULT ? Count(warp_inclusive_scan(sum) - sum) : block_scan"),
        "wrong mask",
    ),
    "a copy that is not waited for": Fault(BITMASK, WAIT, "    if (!FAULT) wait_for_copies<1>();\n", "wrong product"),
    "lanes that do not wait for others' records": Fault(
        BITMASK, READY, "    if (!FAULT) __syncwarp();\n#pragma unroll 1\n", "load of misaligned address"
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """A library with every fault, of which `PLANTED_FAULT` chooses one by its number, and 0 none."""
    folder = tmp_path_factory.mktemp("faulty")
    return simt.build_library(folder / "_C_simt.so", {kernel: with_faults(kernel, folder) for kernel in PROGRAMS})


def with_faults(kernel: str, folder: Path) -> Path:
    source = (simt.CSRC / "cuda" / kernel).read_text()
    if header := INLINED.get(kernel):
        text = (simt.CSRC / "cuda" / header).read_text().replace("#pragma once\n", "")
        source = source.replace(f'#include "cuda/{header}"\n', text)
    for number, fault in enumerate(FAULTS.values(), 1):
        if fault.kernel == kernel:
            assert source.count(fault.whole) == 1
            source = source.replace(fault.whole, fault.broken.replace("FAULT", f"planted({number})"))
    (folder / kernel).write_text(PLANTED + source)
    return folder / kernel


@pytest.fixture
def planted(sanitized_python, faulty):
    """A function that runs a kernel's program with one of the faults, or with fault 0, which is none."""

    def run(kernel: str, fault: int) -> subprocess.CompletedProcess:
        program = f"import torch\ntorch.ops.load_library({str(faulty)!r})\n{PROGRAMS[kernel]}"
        return sanitized_python.run(faulty.parent, program, PLANTED_FAULT=str(fault))

    return run


@pytest.mark.parametrize("kernel", PROGRAMS)
def test_the_unbroken_kernel_passes_where_faults_are_planted(planted, kernel):
    done = planted(kernel, 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    done = planted(FAULTS[fault].kernel, list(FAULTS).index(fault) + 1)
    assert done.returncode != 0 and FAULTS[fault].noticed in done.stderr, done.stderr
