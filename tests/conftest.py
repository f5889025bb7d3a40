"""What all tests share: seeds, the instruction sets of this CPU, and uninitialised memory that cannot pass for a result."""

from __future__ import annotations

import os

import pytest
import torch

import sparsekern.ops  # noqa: F401  (loads the compiled library, or finds out that there is none)
from sparsekern.backends import dispatcher, implementations, table
from sparsekern.backends.libraries import LIBRARIES, Library
from sparsekern.ops._registry import NAMESPACE, OPS

from . import interpreter

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16_emulated", "avx512_bf16")
COMPILED = LIBRARIES["_C"].loaded
GPU_RUNS = ("gpu", "gpu-triton")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("cuda", "triton", "gpu", "gpu-triton"),
        help="run the ops' CUDA implementations of one kind on CPU tensors: C++ through --simt-library, or Triton's interpreter; "
        "or make every tensor of the tests on the GPU (gpu: with the implementations as they are chosen, gpu-triton: without C++)",
    )
    parser.addoption("--simt-library", metavar="FILE", help="the CUDA kernels built for this CPU (tests/native/simt.py)")


def pytest_configure(config) -> None:
    kind = config.getoption("--kernels")
    if kind in GPU_RUNS:
        make_everything_on_gpu(kind)
    elif kind:
        serve_on_cpu(kind, config.getoption("--simt-library"))


def make_everything_on_gpu(kind: str) -> None:
    """Let tensors be made on the GPU where a test does not say otherwise; random numbers stay those that the CPU draws."""
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--kernels={kind}: expected a CUDA device, torch {torch.__version__} sees none")
    if kind == "gpu-triton":
        table.AVAILABILITY["cuda"] = lambda: table.Support(False, "it is not under test")
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, drawn_on_cpu(getattr(torch, name)))
    torch.set_default_device("cuda")


def drawn_on_cpu(draw):
    """`draw`, but with a CPU generator it draws on the CPU, wherever the tensor is to be."""

    def on_default_device(*args, generator=None, **kwargs):
        if generator is None:
            return draw(*args, **kwargs)
        return draw(*args, generator=generator, device=generator.device, **kwargs).to(torch.get_default_device())

    return on_default_device


def pytest_collection_modifyitems(config, items) -> None:
    kind = config.getoption("--kernels")
    kept = [item for item in items if can_run(item) and is_about(item, kind)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def can_run(item) -> bool:
    return torch.cuda.is_available() or item.get_closest_marker("gpu") is None


def is_about(item, kind: str | None) -> bool:
    """With --kernels, only the tests of ops that have such an implementation: the references are tested elsewhere."""
    op = op_of(item) if kind not in (None, "gpu") else None
    return op is None or has_implementation(op, kind.removeprefix("gpu-"))


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
    else:
        interpreter.teach_bfloat16_products()
        interpreter.teach_bfloat16_rounding()
    for other in set(table.AVAILABILITY) - {kind}:
        table.AVAILABILITY[other] = lambda: table.Support(False, "it is not under test")
    table.DEVICES[kind].add("cpu")
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


def pytest_generate_tests(metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        every = ["gpu"] if metafunc.config.getoption("--kernels") in GPU_RUNS else CPU_ISAS if COMPILED else ["reference"]
        metafunc.parametrize("isa", every, indirect=True)


@pytest.fixture
def isa(request, monkeypatch) -> str:
    """Runs the test once for each instruction set of this CPU; once on a GPU, and once where nothing is compiled."""
    if request.param in CPU_ISAS:
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
    torch.use_deterministic_algorithms(True, warn_only=True)  # not every function that a reference calls has a deterministic one
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
