"""Ahead-of-time compilation of Triton kernels, without a GPU, and the resources and instructions of the result."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend

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
    target, options = _target(architecture), {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source_of(case), target=target, options=options)
    cubin = compiled.asm["cubin"]
    usage = _tool("--dump-resource-usage", cubin)
    return Binary(int(re.search(r"STACK:(\d+)", usage)[1]), compiled.metadata.shared, compiled.asm["ptx"], cubin)


def translate(case: CompileCase, architecture: Architecture) -> object:
    """Return Triton's first representation of a kernel, which finds what its Python code does wrong, much sooner than `build`."""
    backend = make_backend(_target(architecture))
    options = backend.parse_options({"num_warps": case.num_warps, "num_stages": case.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    return source_of(case).make_ir(_target(architecture), options, *helpers, context)


def source_of(case: CompileCase) -> ASTSource:
    kernel = case.kernel
    kinds = {name: kind.partition(":") for name, kind in case.signature.items()}
    missing = set(kernel.arg_names) ^ {*kinds, *case.constexprs}
    assert not missing, f"{kernel.__name__}: the compile case and the kernel disagree about {sorted(missing)}"
    return ASTSource(
        kernel,
        signature={name: kinds[name][0] if name in kinds else "constexpr" for name in kernel.arg_names},
        constexprs=case.constexprs,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind[2] == "16"},
    )


def _target(architecture: Architecture) -> GPUTarget:
    major, minor = architecture.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


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


def faults_of_ones(kernel: triton.JITFunction, cases: Sequence[CompileCase], architecture: Architecture) -> list[str]:
    """Return the integer arguments of a kernel with which it is not translated if they are 1, one line for each.

    Triton makes such an argument a Python int, which has no methods.
    """
    found = []
    for name in sorted({name for case in cases for name in integers(case)}):
        case = next(case for case in cases if name in integers(case))
        signature = {other: kind for other, kind in case.signature.items() if other != name}
        try:
            translate(case._replace(signature=signature, constexprs={**case.constexprs, name: 1}), architecture)
        except CompilationError as error:
            found.append(f"{kernel.__name__}: {name} = 1: {error.__cause__ or error}")
    return found


def integers(case: CompileCase) -> list[str]:
    """Return the arguments of a case that Triton makes a constant if they are 1."""
    own = {parameter.name for parameter in case.kernel.params if not parameter.do_not_specialize}
    return [name for name, kind in case.signature.items() if name in own and kind.partition(":")[0] in ("i32", "i64")]


def describe(case: CompileCase) -> str:
    """Return what tells the case from the others of its kernel."""
    types = [kind for kind in case.signature.values() if kind.startswith(("*", "tensordesc"))]
    return f"{' '.join(types)} {case.constexprs} num_warps={case.num_warps} num_stages={case.num_stages}"
