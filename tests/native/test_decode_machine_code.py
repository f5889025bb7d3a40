"""The machine code of the CUDA products of a few tokens: instructions of the inner loops, accesses to memory, occupancy."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from . import simt
from .test_cuda_compiled import ARCHITECTURES, CUOBJDUMP

REGISTERS = 65536  # of a multiprocessor
SHARED = {
    "sm_80": 164 << 10,
    "sm_90": 228 << 10,
}  # bytes of a multiprocessor, of which each block takes RESERVED more than it asks for
RESERVED = 1 << 10
TRITON = {1: 10.6, 16: 16.0}  # instructions for each weight of the Triton kernel of bitmask rows, on sm_90


class Kernel(NamedTuple):
    """A kernel of the library: its registers a thread, its bytes of stack, and its instructions by address."""

    registers: int
    stack: int
    code: dict[int, str]

    def loop(self) -> list[str]:
        """Return the instructions of the smallest loop that multiplies on the tensor cores."""
        loops = []
        for end, text in self.code.items():
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) <= end:
                body = [each for place, each in self.code.items() if int(target[1], 16) <= place <= end]
                loops += [body] if any("HMMA" in each for each in body) else []
        return min(loops, key=len)


def kernels_of(library: Path, op: str, kept: str) -> dict[tuple[str, int], Kernel]:
    """Return the product kernels of an op for bfloat16, by architecture and groups of 8 tokens.

    `kept` is the number of values kept of four, where the kernels have it in their names.
    """
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(library)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = rf"\w*{op}_cu\w*multiply\w*BFloat16ELi(\d)E{f'Li{kept}E' if kept else ''}\w*"
    found, architecture = {}, ""
    for match in re.finditer(rf"^arch = (\w+)$|^ *Function ({wanted}):\n +REG:(\d+) STACK:(\d+)", usage, re.MULTILINE):
        if match[1]:
            architecture = match[1]
        elif architecture in ARCHITECTURES:
            code = code_of(library, architecture, match[2])
            found[architecture, int(match[3])] = Kernel(int(match[4]), int(match[5]), code)
    return found


def code_of(library: Path, architecture: str, function: str) -> dict[int, str]:
    command = [str(CUOBJDUMP), "--dump-sass", "--gpu-architecture", architecture, "--function", function, str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(place, 16): text for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.+?) *;", told)}


@pytest.fixture(scope="module", params=["bitmask_linear", "nm_linear 2", "nm_linear 1", "nm_q4_linear"])
def op(request) -> tuple[str, dict[tuple[str, int], Kernel]]:
    library = importlib.util.find_spec("sparsekern._C_cuda")
    if library is None:
        pytest.skip("_C_cuda was not built here")
    name, _, kept = request.param.partition(" ")
    source = simt.CSRC / "cuda" / f"{name}.cu"
    if Path(library.origin).stat().st_mtime < source.stat().st_mtime:
        pytest.skip(f"_C_cuda is older than {source.name}")
    return request.param, kernels_of(Path(library.origin), name, kept)


def test_inner_loops(op):
    """Of 2:4, the whole loop: at most 4 instructions for each stored value, of 1:4 10. Of a bitmask, for each weight, zeros included.

    With values of 4 bits, the loop over single blocks of 64 columns, 16 values a thread.
    """
    name, kernels = op
    assert set(kernels) == {(architecture, groups) for architecture in ARCHITECTURES for groups in (1, 2)}
    for (_, groups), kernel in kernels.items():
        loop = kernel.loop()
        assert kernel.stack == 0
        products = sum("HMMA.16816" in each if name == "bitmask_linear" else "HMMA.SP" in each for each in loop)
        assert products == (4 if name == "nm_q4_linear" else 8) * groups
        if name == "nm_q4_linear":
            assert len(loop) <= 4.5 * 16 + 30 * (groups - 1)
        elif name == "nm_linear 2":
            assert len(loop) <= 4 * 64  # of a step of 256 columns, 64 values a thread
        elif name == "nm_linear 1":
            assert len(loop) <= (10 if groups == 1 else 11) * 32 < 17.7 * 32  # the Triton kernel, for one token
        else:
            assert len(loop) <= 5 * 64 < 0.5 * TRITON[1] * 64  # of 128 columns and two rows a thread
        assert not any(re.search(r"\b(LDL|STL)\b", each) for each in loop)


def test_weights_are_read_by_16_bytes(op):
    name, kernels = op
    for (_, groups), kernel in kernels.items():
        reads = [each for each in kernel.loop() if re.search(r"\bLDG\b", each)]
        scales = 2 * groups if name == "nm_q4_linear" else 0  # of the tokens
        assert sum(re.search(r"\bLDG\.E\.128\b", each) is None for each in reads) == scales
        copies = [each for each in kernel.code.values() if "LDGSTS" in each]
        assert copies and all(".128" in each for each in copies)


# Threads, and bytes of shared memory, of a block for 1, 8 and 16 tokens: csrc/cuda/<op>.cu.
BLOCKS = {
    "bitmask_linear": (256, lambda tokens: 8 * 2 * (8 * 184 * 4 + 2 * 528)),
    "nm_linear 2": (128, lambda tokens: 4 * 2 * 2 * (16 * 160 + 16 * 16 + tokens * 272)),
    "nm_linear 1": (128, lambda tokens: 4 * 2 * (16 * 144 + 16 * 16 + tokens * 528)),
    "nm_q4_linear": (128, lambda tokens: 4 * 4 * 2 * 4 * 208),
}


@pytest.mark.parametrize(("tokens", "least"), [(1, 2), (8, 2), (16, 1)])
def test_occupancy(op, tokens, least):
    """Several blocks of a multiprocessor hide each other's waits; A100's shared memory holds one of a bitmask."""
    name, kernels = op
    threads, shared = BLOCKS[name]
    for (architecture, groups), kernel in kernels.items():
        if groups == (tokens + 7) // 8:
            by_registers = REGISTERS // (threads * -(-kernel.registers // 8) * 8)
            by_shared = SHARED[architecture] // (shared(tokens) + RESERVED)
            expected = 1 if architecture == "sm_80" and name == "bitmask_linear" else least
            assert min(by_registers, by_shared) >= expected, (architecture, by_registers, by_shared)
