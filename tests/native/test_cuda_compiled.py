"""Every CUDA kernel, compiled for the architectures that are shipped, on machines that need have no GPU: none spills registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .sanitizers import BUILD, ROOT

CSRC = ROOT / "csrc"
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"]  # as in setup.py, and what the assembler says

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path"),
]

FUNCTION = re.compile(r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def assembler_log(source: Path, architecture: str) -> str:
    """What ptxas says about the functions of a file. Kept, so that what has not changed is not compiled again.

    Raises:
        RuntimeError: with the compiler's words, if the file does not compile.
    """
    log = BUILD / "cuda" / f"{source.name}-{architecture}.txt"
    inputs = [source, Path(__file__), *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    if not log.exists() or log.stat().st_mtime <= max(path.stat().st_mtime for path in inputs):
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *FLAGS, f"-arch={architecture}", f"-I{CSRC}", "-cubin", "-o", os.devnull, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        log.write_text(done.stderr)
    return log.read_text()


def faults(source: Path, architecture: str) -> list[str]:
    log = assembler_log(source, architecture)
    functions = FUNCTION.findall(log)
    spills = [
        f"{source.name}, {architecture}: {name} spills ({stores} bytes stored, {loads} loaded)"
        for name, stores, loads in functions
        if int(stores) or int(loads)
    ]
    # Such as launch bounds that cannot be kept.
    warnings = [f"{source.name}, {architecture}: {line}" for line in log.splitlines() if line.startswith("ptxas warning")]
    return [*spills, *warnings] if functions else [f"{source.name}, {architecture}: no function in what ptxas says"]


def test_no_kernel_spills():
    sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size)
    assert sources
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda case: faults(*case), [(source, architecture) for source in sources for architecture in ARCHITECTURES]
        )
    assert not [fault for some in found for fault in some]


SPILLING = """
__global__ void __launch_bounds__(1024) too_many_registers(float* data) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) data[i * 1024 + threadIdx.x] = held[95 - i];
}
"""


def test_a_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    (fault,) = faults(source, "sm_90")
    assert re.search(r"too_many_registers\w* spills \(\d+ bytes stored, \d+ loaded\)", fault)


def test_launch_bounds_that_cannot_be_kept_are_found(tmp_path):
    source = tmp_path / "bounds.cu"
    source.write_text(SPILLING.replace("(1024)", "(32, 64)").replace("96", "4").replace("95", "3"))
    assert any("minnctapersm" in fault for fault in faults(source, "sm_90"))


def test_what_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared(); }")
    with pytest.raises(RuntimeError, match="undeclared"):
        faults(source, "sm_90")
