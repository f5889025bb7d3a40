"""The choice among implementations, on two that do not exist."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern import backends
from sparsekern.backends import BadValues, Implementation, LeftToReference, Support, table


def reference(x):
    if x < 0:
        raise ValueError(f"x: expected no negative number, got {x}")
    return "reference"


def fast(x):
    if x < 0:
        raise BadValues("status 1")
    return "fast"


def few(x) -> Support:
    return Support(x < 10, f"x is {x}, which is not below 10")


@pytest.fixture(autouse=True)
def two_implementations(monkeypatch):
    known = (Implementation("cuda", fast, few), Implementation("triton", lambda x: "slow"))
    monkeypatch.setattr(table, "implementations", lambda op: known if op == "some_op" else ())
    monkeypatch.setattr(table, "AVAILABILITY", {"cuda": lambda: Support(True), "triton": lambda: Support(True)})
    monkeypatch.delenv(table.VARIABLE, raising=False)


def call(x: int) -> str:
    return backends.dispatcher("some_op", reference)(x)


def unavailable(monkeypatch, backend: str) -> None:
    monkeypatch.setitem(table.AVAILABILITY, backend, lambda: Support(False, f"{backend} is not there"))


def test_the_first_that_is_available_and_supports_the_call_runs(monkeypatch):
    assert (call(1), call(10)) == ("fast", "slow") and backends.preferred("some_op") == "cuda"
    unavailable(monkeypatch, "cuda")
    assert call(1) == "slow" and backends.preferred("some_op") == "triton"
    unavailable(monkeypatch, "triton")
    assert call(1) == "reference" and backends.preferred("some_op") == "reference"


def test_a_reference_where_something_faster_was_to_be_expected_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(table, "_said", set())
    with caplog.at_level("WARNING", logger="sparsekern"):
        assert call(1) == "fast" and call(10) == "slow"
        unavailable(monkeypatch, "triton")
        assert call(1) == "fast"
        with backends.use(some_op="reference"):
            call(10)
        assert caplog.records == []
        assert call(10) == call(10) == call(11) == "reference"
        unavailable(monkeypatch, "cuda")
        assert call(1) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        f"some_op: the PyTorch reference runs for CUDA tensors: cuda: {reason}; triton: triton is not there"
        for reason in ("x is 10, which is not below 10", "x is 11, which is not below 10", "cuda is not there")
    ]


def test_a_device_that_triton_cannot_use_is_said(monkeypatch, caplog):
    monkeypatch.setattr(table, "_said", set())
    monkeypatch.setattr(table, "has_capability", lambda device, least: Support(False, f"it needs {least}"))
    unavailable(monkeypatch, "cuda")
    with caplog.at_level("WARNING", logger="sparsekern"):
        assert call(1) == "reference"
    assert caplog.records[0].getMessage().endswith("cuda: cuda is not there; triton: it needs (8, 0)")
    with backends.use(some_op="triton"), pytest.raises(ValueError, match="the triton implementation was requested, but it needs"):
        call(1)


def test_cpu_kernels_are_not_for_cuda_tensors(monkeypatch):
    monkeypatch.setitem(table._ops, "some_op", table._Known(reference, native=True))
    with backends.use(some_op="cpu"), pytest.raises(ValueError, match="^some_op: the cpu implementation was requested, but its"):
        call(1)


def test_one_that_is_asked_for_runs(monkeypatch):
    with backends.use(some_op="triton"):
        assert call(1) == "slow" and backends.preferred("some_op") == "triton"
        with backends.use(some_op="reference"):
            assert call(1) == "reference"
        assert call(1) == "slow"
    assert call(1) == "fast"
    monkeypatch.setenv("SPARSEKERN_BACKENDS", " some_op = triton ,")
    assert call(1) == "slow"
    with backends.use(some_op="cuda"):
        assert call(1) == "fast"


def test_one_that_is_asked_for_runs_or_raises(monkeypatch):
    with backends.use(some_op="cuda"):
        with pytest.raises(
            ValueError, match="^some_op: the cuda implementation was requested, but x is 12, which is not below 10$"
        ):
            call(12)
        unavailable(monkeypatch, "cuda")
        with pytest.raises(RuntimeError, match="^some_op: the cuda implementation was requested, but cuda is not there$"):
            call(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("some_op", "SPARSEKERN_BACKENDS: expected op=implementation, separated by commas, got 'some_op'"),
        ("some_op=cublas", "SPARSEKERN_BACKENDS: expected one of cuda, triton, reference for some_op, got 'cublas'"),
        ("no_op=cuda", "SPARSEKERN_BACKENDS: expected an op of sparsekern, got 'no_op'"),
        ("../x=cuda", "SPARSEKERN_BACKENDS: expected an op of sparsekern, got '../x'"),
        ("devices=cuda", "SPARSEKERN_BACKENDS: expected an op of sparsekern, got 'devices'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, value, message):
    table._from_environment.cache_clear()
    monkeypatch.setenv("SPARSEKERN_BACKENDS", value)
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(1)


def test_use_refuses_what_no_op_has():
    with pytest.raises(ValueError, match="^use: expected one of cuda, triton, reference for some_op, got 'cublas'$"):
        with backends.use(some_op="cublas"):
            pass


def test_a_refused_value_is_named_by_the_reference(monkeypatch):
    with pytest.raises(ValueError, match="^x: expected no negative number, got -3$"):
        call(-3)
    # A kernel that refuses what the reference takes is wrong, and must not be passed over.
    with pytest.raises(BadValues):
        backends.dispatcher("some_op", lambda x: "reference")(-3)


def test_what_is_left_to_the_reference_is_its_result():
    def declines(x):
        raise LeftToReference("rare")

    known = (Implementation("cuda", declines),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "implementations", lambda op: known)
        assert call(1) == "reference"


def test_status_is_read_only_where_values_are_checked():
    bad, good = torch.tensor(3, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    backends.raise_if(good)
    with pytest.raises(BadValues, match="status 3"):
        backends.raise_if(bad)
    with backends.value_checks(False):
        assert not backends.values_are_checked(bad)
        backends.raise_if(bad)
        with backends.value_checks(True):
            assert backends.values_are_checked(bad)
    with pytest.raises(BadValues):
        backends.raise_if(bad)


def test_every_table_names_known_backends(monkeypatch):
    monkeypatch.undo()
    for op in sparsekern.ops._registry.OPS:
        names = [implementation.name for implementation in backends.implementations(op)]
        assert len(set(names)) == len(names) and set(names) <= set(table.AVAILABILITY)
