"""The bodies of the CUDA kernels, run on this CPU as fibers (csrc/testing/simt) under AddressSanitizer and UBSan."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def run_kernels(folder: Path, kernels: Path) -> subprocess.CompletedProcess:
    sources = [CSRC / "testing" / "run_cuda_kernels.cpp", "-x", "c++", *sorted(kernels.glob("*.cu"))]
    include = ["-I", CSRC, "-I", CSRC / "testing", "-I", CSRC / "testing" / "simt"]
    subprocess.run(["c++", *FLAGS, *include, *sources, "-o", folder / "run"], check=True)
    return subprocess.run([folder / "run"], capture_output=True, text=True)


def test_kernels_are_right_and_stay_in_their_memory(tmp_path):
    done = run_kernels(tmp_path, CSRC / "cuda")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "whole, broken, noticed",
    [
        ("  __syncthreads();\n", "", "gram_symmetrize_: wrong"),
        ("column < features && row < column", "row < column", "AddressSanitizer: heap-buffer-overflow"),
        ("row < features && column <= row)", "row < features && column <= row && (__syncthreads(), true))", "while others wait"),
    ],
    ids=["missing barrier", "missing bound", "divergent barrier"],
)
def test_a_planted_fault_is_found(tmp_path, whole, broken, noticed):
    source = (CSRC / "cuda" / "gram_symmetrize.cu").read_text()
    assert source.count(whole) == 1
    (tmp_path / "gram_symmetrize.cu").write_text(source.replace(whole, broken))
    done = run_kernels(tmp_path, tmp_path)
    assert done.returncode != 0 and noticed in done.stderr
