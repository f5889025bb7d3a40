"""Compiles Triton kernels ahead of time, for GPUs that need not be there, and reads what became of them in the machine code."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern import triton_kernels
from sparsekern.triton_kernels._common import CompileCase

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Architecture(NamedTuple):
    """A compute capability, the shared memory that a block may have, and the instruction of its tensor cores."""

    capability: tuple[int, int]
    shared: int
    tensor_core: str

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


ARCHITECTURES = (
    Architecture((8, 0), 163 << 10, r"\bHMMA\."),
    Architecture((9, 0), 227 << 10, r"\bHGMMA\."),
    Architecture((10, 0), 227 << 10, r"\bUTC\w*MMA\b"),
)


class Binary(NamedTuple):
    """What a kernel needs, and its instructions."""

    stack: int  # bytes a thread, all of them registers that were spilled, or arrays that found no registers
    shared: int  # bytes a block
    sass: str


def shipped(architecture: Architecture) -> Iterator[CompileCase]:
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            yield from import_module(module.name).compile_cases(architecture.capability)


def build(case: CompileCase, architecture: Architecture) -> Binary:
    kernel = case.kernel
    kinds = {name: kind.partition(":") for name, kind in case.signature.items()}
    missing = set(kernel.arg_names) ^ {*kinds, *case.constexprs}
    assert not missing, f"{kernel.__name__}: the compile case and the kernel disagree about {sorted(missing)}"
    source = ASTSource(
        kernel,
        signature={name: kinds[name][0] if name in kinds else "constexpr" for name in kernel.arg_names},
        constexprs=case.constexprs,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind[2] == "16"},
    )
    major, minor = architecture.capability
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("--dump-resource-usage", cubin)
        return Binary(int(re.search(r"STACK:(\d+)", usage)[1]), compiled.metadata.shared, _tool("--dump-sass", cubin))


def _tool(*arguments: object) -> str:
    command = [str(TOOLS / "cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(case: CompileCase, architecture: Architecture) -> list[str]:
    """What is wrong with a shipped configuration on an architecture; nothing, it is hoped."""
    binary = build(case, architecture)
    found = []
    if binary.stack:
        found.append(f"spills: {binary.stack} bytes of stack")
    if binary.shared > architecture.shared:
        found.append(f"{binary.shared} bytes of shared memory, {architecture.shared} are there")
    if case.tensor_cores and not re.search(architecture.tensor_core, binary.sass):
        found.append(f"no {architecture.tensor_core} among the instructions")
    return [f"{architecture.name} {case.kernel.__name__} {describe(case)}: {fault}" for fault in found]


def faults_of_number(number: int, architecture: Architecture) -> list[str]:
    """For another process, to which a kernel cannot be sent."""
    return faults(list(shipped(architecture))[number], architecture)


def describe(case: CompileCase) -> str:
    """What tells the case from the others of its kernel."""
    types = [kind for kind in case.signature.values() if kind.startswith(("*", "tensordesc"))]
    return f"{' '.join(types)} {case.constexprs} num_warps={case.num_warps} num_stages={case.num_stages}"
