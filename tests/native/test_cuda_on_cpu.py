"""The bodies of the CUDA kernels, run on this CPU as fibers (csrc/testing/simt) under AddressSanitizer and UBSan.

The kernels' own files and their torch wrappers are compiled as they are, and every test under tests/ops runs on them.
"""

from __future__ import annotations

import shutil
import subprocess
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


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_op_tests_pass_on_the_cuda_kernels(package, order):
    library = simt.build_library()
    result = sanitizers.run_op_tests(package, "--kernels=cuda", f"--simt-library={library}", SPARSEKERN_SIMT_ORDER=order)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]


MIRROR = """
import torch
torch.ops.load_library({library!r})
for features in (1, 31, 32, 33, 64, 97):
    lower = torch.randn(features, features).tril()
    gram = lower + torch.full_like(lower, float("nan")).triu(1)
    torch.ops.sparsekern_cuda.gram_symmetrize_(gram)
    assert torch.equal(gram, lower + lower.tril(-1).T), f"wrong at {{features}}"
"""


def mirror(package: Path, folder: Path, whole: str, broken: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs gram_symmetrize_ with a fault planted into its kernel."""
    source = (simt.CSRC / "cuda" / "gram_symmetrize.cu").read_text()
    assert source.count(whole) == 1
    kernel = folder / "gram_symmetrize.cu"
    kernel.write_text(source.replace(whole, broken))
    library = simt.build_library(folder / "_C_simt.so", {kernel.name: kernel})
    return sanitizers.run(package, "-c", MIRROR.format(library=str(library)), **environment)


def test_the_unbroken_kernel_passes_where_faults_are_planted(package, tmp_path):
    done = mirror(package, tmp_path, "__syncthreads();", "__syncthreads();")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "whole, broken, noticed",
    [
        ("  __syncthreads();\n", "", "wrong at"),
        ("column < features && row < column", "row < column", "AddressSanitizer: heap-buffer-overflow"),
        ("row < features && column <= row)", "row < features && column <= row && (__syncthreads(), true))", "while others wait"),
        ("  __syncthreads();\n", "  __syncthreads();\n  if (threadIdx.x < 31) __shfl_sync(~0u, 1, 0);\n", "has left the kernel"),
        ("  __syncthreads();\n", "  __syncthreads();\n  if (threadIdx.x < 31) __syncwarp(); else __syncthreads();\n", "deadlock"),
    ],
    ids=["race: missing barrier", "out of bounds", "divergent barrier", "missing lane", "warp against block"],
)
def test_a_planted_fault_is_found(package, tmp_path, whole, broken, noticed):
    done = mirror(package, tmp_path, whole, broken)
    assert done.returncode != 0 and noticed in done.stderr, done.stderr
