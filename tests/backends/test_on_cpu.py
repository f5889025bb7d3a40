"""What runs on CPU tensors: `use` and the environment are obeyed there too, and a reference in a kernel's place is logged once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sparsekern import backends, ops
from sparsekern.backends import table
from sparsekern.backends.libraries import LIBRARIES, Library
from sparsekern.ops._registry import OPS

ROOT = Path(__file__).resolve().parents[2]
COMPILED = LIBRARIES["_C"].loaded
EVERYWHERE = [op for op in OPS.values() if not op.only_on_cuda]
with_kernels = pytest.mark.skipif(not COMPILED, reason="no compiled library")
CAPTURED = "sparsekern"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(table, "_said", set())


@pytest.fixture
def marked(monkeypatch):
    """The references of two ops answer with marks of their own: which of them ran."""
    ran = []
    for name in ("nm_mask", "topk_mask", "sensitivity_", "cross_gram_"):
        known = table._ops[name]

        def marking(*args, known=known, name=name, **kwargs):
            ran.append(name)
            return known.reference(*args, **kwargs)

        monkeypatch.setitem(table._ops, name, known._replace(reference=marking))
    return ran


def mask() -> torch.Tensor:
    return ops.nm_mask(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), "2:4")


@with_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_reference_that_is_asked_for_runs(marked, mode):
    with mode():
        expected = mask()
        assert marked == []
        with backends.use(nm_mask="reference"):
            assert torch.equal(mask(), expected) and marked == ["nm_mask"]
            with backends.use(topk_mask="reference"):
                mask()
                ops.topk_mask(torch.randn(2, 3), 1)
            with backends.use(nm_mask="cpu"):
                mask()
        mask()
    assert marked == ["nm_mask", "nm_mask", "topk_mask"]


@with_kernels
def test_ops_inside_a_reference_are_chosen_too(marked):
    arguments = torch.zeros(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    with backends.use(sensitivity_="reference", cross_gram_="reference"):
        ops.sensitivity_(*arguments)
    assert marked == ["sensitivity_", "cross_gram_"]


@with_kernels
def test_every_op_gives_its_references_result():
    for op in EVERYWHERE:
        sample = next(op.samples(torch.Generator().manual_seed(0)))
        with backends.use(**{op.name: "reference"}):
            op.overload(*sample.args, **sample.kwargs)


@with_kernels
def test_another_thread_is_not_asked(marked):
    with backends.use(nm_mask="reference"):
        thread = threading.Thread(target=mask)
        thread.start()
        thread.join()
    assert marked == []


@with_kernels
def test_a_packed_layer_obeys():
    import sparsekern

    linear = torch.nn.Linear(8, 4)
    layer = sparsekern.SparseLinear.from_linear(linear, "bitmask")
    x = torch.randn(3, 8)
    known = table._ops["bitmask_linear"]
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table._ops, "bitmask_linear", known._replace(reference=lambda *a: ran.append(0) or known.reference(*a)))
        with torch.no_grad(), backends.use(bitmask_linear="reference"):
            torch.testing.assert_close(layer(x), linear(x))
    assert ran == [0]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_implementation_for_other_devices_is_refused(backend):
    op = {"cuda": "nm_mask", "triton": "gram_"}[backend]
    with (
        backends.use(**{op: backend}),
        pytest.raises(ValueError, match=f"^{op}: the {backend} implementation was requested, but its tensors are on the CPU$"),
    ):
        mask() if op == "nm_mask" else ops.gram_(torch.zeros(4, 4), torch.randn(2, 4))


def test_kernels_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "_C", Library("_C", False, "not built"))
    with (
        backends.use(nm_mask="cpu"),
        pytest.raises(RuntimeError, match="^nm_mask: the cpu implementation was requested, but it is not built$"),
    ):
        mask()


def test_an_op_without_a_kernel_has_no_cpu_implementation():
    with pytest.raises(ValueError, match="^use: expected one of triton, reference for sensitivity_, got 'cpu'$"):
        with backends.use(sensitivity_="cpu"):
            pass


@with_kernels
@pytest.mark.parametrize("op", [op.name for op in EVERYWHERE])
def test_the_table_knows_which_ops_have_a_kernel(op):
    assert table._ops[op].native == torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{op}", "CPU")


@with_kernels
def test_fakes_and_compiled_calls_go_by_an_active_use():
    with backends.use(nm_mask="reference"):
        compiled = torch.compile(lambda x: ops.nm_mask(x, "2:4"), backend="aot_eager")
        x = torch.randn(2, 8)
        assert torch.equal(compiled(x), ops.nm_mask(x, "2:4"))
        assert ops.nm_mask(torch.empty(2, 8, device="meta"), "2:4").is_meta


def test_a_missing_library_is_said_once_for_an_op(monkeypatch, caplog):
    monkeypatch.setitem(LIBRARIES, "_C", Library("_C", False, "not built"))
    run = backends.last_resort("nm_mask")
    with caplog.at_level(logging.WARNING, logger=CAPTURED):
        for _ in range(3):
            run(torch.randn(2, 4), 2, 4)
        backends.last_resort("topk_mask")(torch.randn(2, 4), 2)
        backends.last_resort("cross_gram_")(torch.zeros(2, 2), torch.randn(3, 2), torch.randn(3, 2))  # which has no kernel anywhere
    assert [record.getMessage() for record in caplog.records] == [
        f"{op}: the PyTorch reference runs for CPU tensors: the CPU kernels are not built" for op in ("nm_mask", "topk_mask")
    ]


def test_a_library_without_the_op_is_said(monkeypatch, caplog):
    monkeypatch.setitem(LIBRARIES, "_C", Library("_C", True, ""))
    with caplog.at_level(logging.WARNING, logger=CAPTURED):
        backends.last_resort("nm_mask")(torch.randn(2, 4), 2, 4)
    (record,) = caplog.records
    assert "nm_mask: the PyTorch reference runs for CPU tensors: the compiled library has no kernel for it" in record.getMessage()


@with_kernels
def test_nothing_is_said_where_kernels_run_or_a_reference_is_wanted(monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG, logger=CAPTURED):
        mask()
        ops.sensitivity_(torch.zeros(3, 4), torch.randn(3, 4), torch.randn(5, 4))
        with backends.use(nm_mask="reference"):
            mask()
        monkeypatch.setitem(LIBRARIES, "_C", Library("_C", False, "left out", wanted=False))
        backends.last_resort("nm_mask")(torch.randn(2, 4), 2, 4)
    assert caplog.records == []


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, env=environment)


@with_kernels
def test_the_environment_is_obeyed_on_cpu_tensors():
    code = """
import torch, sys
import sparsekern.ops.nm_mask
ran = []
def tracer(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "keep_largest":  # of the reference
        ran.append(frame.f_code.co_name)
import sparsekern.ops as ops
sys.setprofile(tracer)
mask = ops.nm_mask(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), "2:4")
sys.setprofile(None)
print(len(ran), mask.tolist())
try:
    ops.gram_(torch.zeros(4, 4), torch.randn(2, 4))
except ValueError as error:
    print(error)
"""
    done = run(code, SPARSEKERN_BACKENDS="nm_mask=reference,gram_=triton")
    assert done.stderr == "" and done.stdout.splitlines() == [
        "1 [[False, True, True, False]]",
        "gram_: the triton implementation was requested, but its tensors are on the CPU",
    ]


def test_an_environment_that_makes_no_sense_is_refused_at_once():
    done = run("import sparsekern.ops", SPARSEKERN_BACKENDS="nm_mask=fast")
    assert "ValueError: SPARSEKERN_BACKENDS: expected one of cpu, cuda, reference for nm_mask, got 'fast'" in done.stderr


def test_the_kernels_can_be_left_out():
    code = """
import torch, sparsekern, sparsekern.ops as ops
from sparsekern.backends.libraries import check_isa
check_isa()
print(ops.nm_mask(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), "2:4").tolist(), "sparsekern._C" in __import__("sys").modules)
print(sparsekern.info().libraries["_C"], sparsekern.info().cpu["in use"])
"""
    done = run(code, SPARSEKERN_CPU_ISA="reference")
    assert done.stderr == "" and done.stdout.splitlines() == [
        "[[False, True, True, False]] False",
        "left out by SPARSEKERN_CPU_ISA=reference reference",
    ]


@with_kernels
def test_leaving_them_out_later_is_refused(monkeypatch):
    from sparsekern.backends.libraries import check_isa

    monkeypatch.setenv("SPARSEKERN_CPU_ISA", "reference")
    with pytest.raises(ValueError, match="^SPARSEKERN_CPU_ISA: expected 'reference' to be set before sparsekern is imported"):
        check_isa()
