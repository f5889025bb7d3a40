"""Every instruction set is compiled on every machine; those that this CPU cannot run are one skipped test each."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess

import pytest

import sparsekern
from tests.conftest import COMPILED, ISAS, cpu_has

pytestmark = [
    pytest.mark.skipif(not COMPILED, reason="sparsekern._C is not built, so no instruction set is used"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"),
]


@pytest.mark.parametrize("name", ISAS)
def test_this_cpu_runs(name, monkeypatch):
    """A skip here means that all tests with the parameter `isa` were left out for this instruction set."""
    if not cpu_has(name):
        pytest.skip(f"{name}: this CPU does not have it; its kernels are compiled, but no test runs them")
    monkeypatch.setenv("SPARSEKERN_CPU_ISA", name)
    assert sparsekern.info().cpu["in use"] == name


@pytest.fixture(scope="module")
def instructions() -> str:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    library = importlib.util.find_spec("sparsekern._C").origin
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("name", "instruction"),
    [("avx2", r"vfmadd\w+ .*%ymm"), ("avx512", r"vfmadd\w+ .*%zmm"), ("avx512_bf16", r"vdpbf16ps .*%zmm")],
)
def test_is_compiled(instructions, name, instruction):
    assert re.search(instruction, instructions)
