"""What all tests share: seeds, the instruction sets of this CPU, and uninitialised memory that cannot pass for a result."""

from __future__ import annotations

import os

import pytest
import torch

import sparsekern.ops  # noqa: F401  (loads the compiled library, or finds out that there is none)
from sparsekern.backends import dispatcher, implementations, table
from sparsekern.backends.libraries import LIBRARIES, Library
from sparsekern.ops._registry import NAMESPACE, OPS

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16_emulated", "avx512_bf16")
COMPILED = LIBRARIES["_C"].loaded


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("cuda", "triton"),
        help="run the ops' CUDA implementations of one kind on CPU tensors: C++ through --simt-library, or Triton's interpreter",
    )
    parser.addoption("--simt-library", metavar="FILE", help="the CUDA kernels built for this CPU (tests/native/simt.py)")


def pytest_configure(config) -> None:
    kind = config.getoption("--kernels")
    if kind:
        serve_on_cpu(kind, config.getoption("--simt-library"))


def pytest_collection_modifyitems(config, items) -> None:
    """With --kernels, only the tests of ops that have such an implementation: the references are tested elsewhere."""
    kind = config.getoption("--kernels")
    if kind:
        without = [item for item in items if (op := op_of(item)) and not has_implementation(op, kind)]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in set(without)]


def op_of(item) -> str | None:
    """The op that a test is about: its parameter of that name, or the one its file is named after."""
    if hasattr(item, "callspec") and "op" in item.callspec.params:
        return item.callspec.params["op"].name
    name = item.path.stem.removeprefix("test_")
    return next((op for op in OPS if op.rstrip("_") == name), None)


def has_implementation(op: str, kind: str) -> bool:
    return any(implementation.name == kind for implementation in implementations(op))


def serve_on_cpu(kind: str, simt_library: str | None) -> None:
    """Put the `kind` implementations behind the ops on CPU tensors; an op without one keeps its reference."""
    if COMPILED:
        raise pytest.UsageError("--kernels: expected a copy of the package without sparsekern._C, whose kernels would run instead")
    if kind == "cuda":
        torch.ops.load_library(simt_library)
        LIBRARIES["_C_cuda"] = Library("_C_cuda", True, "")
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("--kernels=triton: expected TRITON_INTERPRET=1 in the environment")
    for other in set(table.AVAILABILITY) - {kind}:
        table.AVAILABILITY[other] = lambda: table.Support(False, "it is not under test")
    for op in OPS.values():
        if has_implementation(op.name, kind):
            torch.library.register_kernel(f"{NAMESPACE}::{op.name}", "cpu")(dispatcher(op.name, op.reference))


def cpu_has(isa: str) -> bool:
    """Whether this CPU has the instructions, by torch's word and not by the library under test."""
    if isa == "scalar":
        return True
    asked = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx512_bf16_emulated": torch.cpu._is_avx512_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    }
    return asked[isa]()


CPU_ISAS = [isa for isa in ISAS if cpu_has(isa)]


@pytest.fixture(params=CPU_ISAS if COMPILED else ["reference"])
def isa(request, monkeypatch) -> str:
    """Runs the test once for each instruction set of this CPU; once, through the references, where nothing is compiled."""
    if COMPILED:
        monkeypatch.setenv("SPARSEKERN_CPU_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned():
    """`torch.empty` returns NaN, True and the largest integers, so that an element nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(mode)


@pytest.fixture
def threads():
    """A setter of torch's number of threads that is undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    asked = os.environ.get("SPARSEKERN_CPU_ISA", "")
    what = f"kernels for {', '.join(CPU_ISAS)}" if COMPILED else f"references ({LIBRARIES['_C'].reason})"
    return f"sparsekern: {what}{f'; SPARSEKERN_CPU_ISA={asked}' if asked else ''}"
