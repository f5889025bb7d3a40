"""Ahead-of-time compilation of Triton kernels, without a GPU, and the resources and instructions of the result."""

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
    """A compute capability, the shared memory that a block may have, and the PTX instruction of its tensor cores.

    An assembler can only translate that instruction: none falls back to arithmetic outside of the tensor cores.
    """

    capability: tuple[int, int]
    shared: int
    tensor_core: str

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


ARCHITECTURES = (
    Architecture((8, 0), 163 << 10, r"\bmma\.sync\."),
    Architecture((9, 0), 227 << 10, r"\bwgmma\.mma_async\."),
    Architecture((10, 0), 227 << 10, r"\btcgen05\.mma\."),
)


class Binary(NamedTuple):
    """A compiled kernel and what it needs.

    Attributes:
        stack: bytes a thread. All of them are registers that were spilled, or arrays that found no registers.
        shared: bytes of shared memory a block.
        ptx: what Triton hands to the assembler.
        cubin: what the assembler makes of it.
    """

    stack: int
    shared: int
    ptx: str
    cubin: bytes

    @property
    def sass(self) -> str:
        """The machine code as text. It takes as long as compiling the kernel, so only tests that read it ask for it."""
        return _tool("--dump-sass", self.cubin)


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
    cubin = compiled.asm["cubin"]
    usage = _tool("--dump-resource-usage", cubin)
    return Binary(int(re.search(r"STACK:(\d+)", usage)[1]), compiled.metadata.shared, compiled.asm["ptx"], cubin)


def _tool(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(case: CompileCase, architecture: Architecture) -> list[str]:
    """Return what is wrong with a configuration on an architecture, one line a fault."""
    binary = build(case, architecture)
    found = []
    if binary.stack:
        found.append(f"spills: {binary.stack} bytes of stack")
    if binary.shared > architecture.shared:
        found.append(f"{binary.shared} bytes of shared memory, {architecture.shared} are there")
    if case.tensor_cores and not re.search(architecture.tensor_core, binary.ptx):
        found.append(f"no {architecture.tensor_core} among the instructions")
    return [f"{architecture.name} {case.kernel.__name__} {describe(case)}: {fault}" for fault in found]


def faults_of_number(number: int, architecture: Architecture) -> list[str]:
    """Return the faults of a configuration by its number: kernels cannot be sent to another process."""
    return faults(list(shipped(architecture))[number], architecture)


def describe(case: CompileCase) -> str:
    """Return what tells the case from the others of its kernel."""
    types = [kind for kind in case.signature.values() if kind.startswith(("*", "tensordesc"))]
    return f"{' '.join(types)} {case.constexprs} num_warps={case.num_warps} num_stages={case.num_stages}"
