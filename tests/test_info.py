import json
import re

import pytest
import torch

import sparsekern
from sparsekern import _info
from sparsekern.backends import availability
from sparsekern.backends.libraries import LIBRARIES, Library
from sparsekern.ops._registry import OPS
from tests.conftest import COMPILED, CPU_ISAS


def test_every_op_has_every_backend_or_a_reason():
    found = sparsekern.info()
    assert set(found.ops) == set(OPS)
    text = str(found)
    for name, states in found.ops.items():
        assert set(states) == {"reference", "cpu", "cuda", "triton", "taken on CUDA"} and all(states.values())
        only_on_cuda = OPS[name].only_on_cuda
        assert states["reference"] == (only_on_cuda or "yes")
        assert re.search(rf"^  {re.escape(name)} +{'-' if only_on_cuda else 'yes'}", text, re.MULTILINE) and only_on_cuda in text
    assert json.loads(json.dumps(found.to_dict()))["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("name", ["bitmask_linear", "nm_linear"])
def test_products_from_packed_weights_have_two_implementations_on_a_device(name):
    """Those in C++ come first, and those in Triton where the library is not loaded, as beside a torch without CUDA."""
    states = sparsekern.info().ops[name]
    able = {backend: availability(backend) for backend in ("cuda", "triton")}
    assert {backend: states[backend] for backend in able} == {
        backend: "yes" if here.ok else here.reason for backend, here in able.items()
    }
    assert states["taken on CUDA"] == next((backend for backend, here in able.items() if here.ok), "reference")


def test_the_reason_of_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "_C", Library("_C", False, "not built"))
    found = sparsekern.info()
    assert found.libraries["_C"] == "not built" and found.cpu["in use"] == "reference"
    assert all(states["cpu"] == (OPS[name].only_on_cuda or "not built") for name, states in found.ops.items())
    assert "[1] not built" in str(found)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_the_reason_for_no_cuda():
    found = sparsekern.info()
    assert found.libraries["_C_cuda"] == found.libraries["cuSPARSELt"] == "this torch is built without CUDA"
    assert found.devices == [] and "cpu only" in str(found)


@pytest.mark.skipif(not COMPILED, reason="no compiled library")
def test_instruction_sets(monkeypatch):
    monkeypatch.delenv("SPARSEKERN_CPU_ISA", raising=False)
    best = [isa for isa in CPU_ISAS if not isa.endswith("_emulated")][-1]
    assert sparsekern.info().cpu["detected"] == sparsekern.info().cpu["in use"] == best
    monkeypatch.setenv("SPARSEKERN_CPU_ISA", "scalar")
    assert sparsekern.info().cpu["in use"] == "scalar"
    monkeypatch.setenv("SPARSEKERN_CPU_ISA", "mmx")
    reason = "SPARSEKERN_CPU_ISA: expected scalar, avx2, avx512"
    assert sparsekern.info().cpu["in use"].startswith(f"none: {reason}")
    assert sparsekern.info().ops["gram_"]["cpu"].startswith(reason) and f"[1] {reason}" in str(sparsekern.info())


def test_an_absent_package_says_what_it_is_for():
    assert _info._version("no-such-package", "something") == "not installed (for something)"
