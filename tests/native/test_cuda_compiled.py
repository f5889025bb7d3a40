"""The CUDA kernels as they were built, on machines that need have no GPU: none spills registers on an architecture that is shipped.

Reads the library instead of compiling its sources again. CI builds it with the assembler's warnings as errors (.ci/run).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsekern.backends.libraries import LIBRARIES

triton = pytest.importorskip("triton", reason="triton brings the tool that reads CUDA libraries")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = {"sm_80", "sm_90"}
SECTION = re.compile(r"^arch = (\w+)$|^ *Function (\w+):\n +REG:\d+ STACK:(\d+)", re.MULTILINE)


def stacks(binary: Path) -> list[tuple[str, str, int]]:
    """Return each function's architecture, its name and its bytes of stack, all of which are registers that were spilled."""
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(binary)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architecture, found = "", []
    for match in SECTION.finditer(told):
        if match[1]:
            architecture = match[1]
        else:
            found.append((architecture, match[2], int(match[3])))
    return found


def test_no_kernel_spills():
    library = importlib.util.find_spec("sparsekern._C_cuda")
    if library is None:
        pytest.skip(f"_C_cuda was not built here: {LIBRARIES['_C_cuda'].reason}")
    functions = stacks(Path(library.origin))
    assert {architecture for architecture, _, _ in functions} >= ARCHITECTURES
    assert len(functions) > 50
    assert [function for function in functions if function[2]] == []


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
STRICT = ["-Xptxas", "--warn-on-spills,--warning-as-error"]  # as in .ci/run

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")


def compiled(source: Path, *flags: str) -> subprocess.CompletedProcess:
    command = ["nvcc", "-arch=sm_90", "-O3", "-cubin", *flags, "-o", str(source.with_suffix(".cubin")), str(source)]
    environment = {name: value for name, value in os.environ.items() if name != "NVCC_APPEND_FLAGS"}  # CI sets it
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_nvcc
def test_a_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert compiled(source).returncode == 0
    ((architecture, name, stack),) = stacks(source.with_suffix(".cubin"))
    assert architecture in ("", "sm_90") and "too_many_registers" in name and stack > 0


@needs_nvcc
@pytest.mark.parametrize(
    ("change", "message"),
    [({}, "spill"), ({"(1024)": "(32, 64)", "96": "4", "95": "3"}, "minnctapersm")],
    ids=["spills", "launch bounds that cannot be kept"],
)
def test_warnings_of_the_assembler_are_errors_in_ci(tmp_path, change, message):
    text = SPILLING
    for old, new in change.items():
        text = text.replace(old, new)
    source = tmp_path / "warned.cu"
    source.write_text(text)
    assert " ".join(STRICT) in (Path(__file__).parents[2] / ".ci" / "run").read_text()
    assert compiled(source).returncode == 0
    refused = compiled(source, *STRICT)
    assert refused.returncode != 0 and message in refused.stderr
