"""Every shipped configuration of every Triton kernel, compiled for GPUs that need not be there: no spills, shared memory that the
architecture has, and the tensor-core instructions that are meant."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from .sanitizers import BUILD

pytest.importorskip("triton", reason="Triton kernels need triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sparsekern.triton_kernels import bitmask_linear, gram, sensitivity  # noqa: E402
from sparsekern.triton_kernels._common import CompileCase  # noqa: E402

from . import triton_build  # noqa: E402
from .triton_build import ARCHITECTURES, build, faults, faults_of_ones, shipped  # noqa: E402

EVERY = os.environ.get("SPARSEKERN_EVERY_CONFIGURATION") == "1"  # as `make test-triton` sets it
ON_EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)


@pytest.fixture(scope="module", autouse=True)
def cache():
    """Kept, so that what has not changed is not compiled again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(BUILD / "triton"))
        yield


@pytest.fixture(scope="module")
def processes(cache):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


def kind_of_product(case: CompileCase) -> object:
    return case.kernel, case.tensor_cores


def all_but_the_kind_of_16_bits(case: CompileCase) -> object:
    """They are loaded, converted and multiplied by the same number of instructions."""
    return case.kernel, str(case._replace(kernel=None)).replace("fp16", "bf16")


# Of configurations that have this in common one is compiled, unless all are wanted. Hopper's registers stand for those of the others.
ALIKE = {"sm_80": kind_of_product, "sm_90": all_but_the_kind_of_16_bits, "sm_100": kind_of_product}


def compiled_for(architecture: triton_build.Architecture) -> list[int]:
    """Return the numbers of the configurations to compile."""
    cases = list(shipped(architecture))
    if EVERY:
        return list(range(len(cases)))
    first: dict[object, int] = {}
    for number, case in enumerate(cases):
        first.setdefault(ALIKE[architecture.name](case), number)
    return list(first.values())


@pytest.mark.slow
@ON_EVERY_ARCHITECTURE
def test_every_shipped_configuration(architecture, processes):
    numbers = compiled_for(architecture)
    assert numbers
    found = processes.map(triton_build.faults_of_number, numbers, [architecture] * len(numbers), chunksize=4)
    assert not [fault for faults in found for fault in faults]


@pytest.mark.slow
def test_integers_that_are_one():
    """Triton translates them as constants: an op with one feature, one expert or one token would not run."""
    kernels = {}
    for case in shipped(ARCHITECTURES[1]):
        kernels.setdefault(case.kernel, []).append(case)
    assert not [fault for kernel, cases in kernels.items() for fault in faults_of_ones(kernel, cases, ARCHITECTURES[1])]


@triton.jit
def with_methods_of_its_sizes(x, size, stride):
    """Store the number of values, as no kernel should."""
    tl.store(x, size.to(tl.int64) * stride)


def test_an_integer_that_must_not_be_one_is_found():
    case = CompileCase(with_methods_of_its_sizes, {"x": "*i64", "size": "i32", "stride": "i32"}, {}, 1, 1)
    (fault,) = faults_of_ones(with_methods_of_its_sizes, [case], ARCHITECTURES[1])
    assert fault.startswith("with_methods_of_its_sizes: size = 1: ") and "'int' object has no attribute 'to'" in fault


def wide_case(**changes):
    """The Gram kernel as a large bf16 input gets it on Hopper."""
    cases = gram.compile_cases((9, 0))
    wanted = {"COLUMNS": 256, "DESCRIPTORS": True, "partials": None}
    case = next(
        case for case in cases if case.signature["x"].startswith("tensordesc<bf16") and wanted.items() <= case.constexprs.items()
    )
    return case._replace(**changes)


def test_on_hopper_both_operands_of_the_gram_product_come_from_shared_memory_as_they_lie():
    sass = build(wide_case(), ARCHITECTURES[1]).sass
    products = [match.start() for match in re.finditer("HGMMA", sass)]
    loop = sass[products[0] : sass.index("BRA", products[-1])]
    # 64 x 256 accumulators a warpgroup, the largest there are; either operand read transposed by the tensor cores themselves.
    assert len(re.findall(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB", loop)) == len(products) == 4
    assert len(re.findall("UTMALDG", loop)) == 2
    assert not re.findall(r"\b(LDS|STS|LDSM|STSM|MOVM|SHFL|PRMT|LDG|LDL|STL)\b", loop)
    # One wait an iteration, for the products before the last: the tensor cores never run dry.
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", loop) == ["0x1"]


def test_on_hopper_absolute_values_are_taken_in_registers_while_the_tensor_cores_work():
    cases = sensitivity.compile_cases((9, 0))
    case = next(case for case in cases if case.signature["x"].startswith("tensordesc<bf16"))
    sass = build(case, ARCHITECTURES[1]).sass
    products = [match.start() for match in re.finditer("HGMMA", sass)]
    before, loop = sass[: products[0]], sass[products[0] : sass.index("BRA", products[-1])]
    assert len(re.findall(r"LDSM\.16\.MT88\.4", before)) == 4 and len(re.findall(r"LOP3\.LUT R\d+, R\d+, 0x7fff7fff", before)) == 16
    assert len(re.findall(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", loop)) == len(products) == 4
    assert not re.findall(r"\b(LDS|STS|LDSM|STSM|MOVM|SHFL|PRMT|LDG|LDL|STL)\b", loop)
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", loop)
    assert waits and "0x0" not in waits


def test_spills_are_found():
    case = wide_case(num_warps=4)  # 256 accumulators a thread
    assert any("spills" in fault for fault in faults(case, ARCHITECTURES[1]))


def test_too_much_shared_memory_is_found():
    case = wide_case(num_stages=6)
    assert any("bytes of shared memory, 232448 are there" in fault for fault in faults(case, ARCHITECTURES[1]))


def test_a_missing_tensor_core_instruction_is_found():
    assert faults(wide_case(), ARCHITECTURES[1]) == []
    other = ARCHITECTURES[1]._replace(tensor_core=ARCHITECTURES[0].tensor_core)
    assert any("among the instructions" in fault for fault in faults(wide_case(), other))


def test_a_case_that_does_not_fit_its_kernel_is_found():
    case = wide_case()
    with pytest.raises(AssertionError, match=r"product: .* disagree about \['alpha'\]"):
        build(case._replace(signature={name: kind for name, kind in case.signature.items() if name != "alpha"}), ARCHITECTURES[1])


@ON_EVERY_ARCHITECTURE
def test_odd_sizes_of_the_result_do_not_spill(architecture):
    case = next(
        case
        for case in gram.compile_cases(architecture.capability)
        if {"COLUMNS": 256, "partials": None}.items() <= case.constexprs.items()
    )
    odd = {name: case.signature[name].removesuffix(":16") for name in ("rows", "columns", "out", "out_stride")}
    assert not faults(case._replace(signature={**case.signature, **odd}), architecture)


def test_without_the_copy_engine_operands_are_copied_to_shared_memory_by_16_bytes():
    for case in gram.compile_cases((8, 0)):
        if case.tensor_cores:
            assert set(re.findall(r"LDGSTS\S*", build(case, ARCHITECTURES[0]).sass)) == {"LDGSTS.E.BYPASS.128"}


@ON_EVERY_ARCHITECTURE
def test_bits_are_counted_by_the_instruction_that_there_is(architecture):
    case = next(bitmask_linear.compile_cases(architecture.capability))
    sass = build(case, architecture).sass
    assert "POPC" in sass and "0x33333333" not in sass  # of the arithmetic that the kernel spells out
