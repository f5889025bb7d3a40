"""A packed layer while a stream is captured into a CUDA graph: nothing waits for the device, reads from it, or brings it other memory.

The tensors lie on this CPU and pass for those of a GPU. Launches are stubbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern import SparseLinear
from sparsekern.backends import bitmask_linear, decode, devices, dispatcher, nm_linear, nm_q4_linear, table
from sparsekern.backends.devices import YES, Support
from sparsekern.ops import OPS
from sparsekern.runtime import formats

LAYERS = {"bitmask": "bitmask_linear", "1:4": "nm_linear", "2:8": "nm_linear", "2:4-q4": "nm_q4_linear", "1:4-q4": "nm_q4_linear"}
CALLS = {"bitmask_linear": "BITMASK_LINEAR", "nm_linear": "NM_LINEAR", "nm_q4_linear": "Q4_LINEAR"}


class RefusedError(AssertionError):
    """Something that a captured stream does not allow."""


class Capture(TorchDispatchMode):
    """Refuses operations that wait for a value, make a tensor from the host's numbers, or move one."""

    WAITING = (
        *("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select"),
        *("aten.lift_fresh", "aten._pin_memory"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).startswith(self.WAITING) or (str(func).startswith("aten._to_copy") and kwargs.get("device") is not None):
            raise RefusedError(str(func))
        return func(*args, **kwargs)


def refused(*args, **kwargs):
    raise RefusedError("a captured stream does not allow this")


@pytest.fixture(params=["cuda", "triton"])
def launches(request, monkeypatch) -> Iterator[list[str]]:
    """The launches of the C++ kernels, or of Triton's where those are not under test, on a device that is being captured."""
    triton = pytest.importorskip("triton")
    from sparsekern.triton_kernels import _common

    found: list[str] = []

    def raw(op):
        def launch(x, packed, *rest):
            found.append(op)
            rows = rest[0] if op == "nm_q4_linear" else len(rest[2] if op == "bitmask_linear" else packed)
            return x.new_empty(len(x), rows)

        return launch

    def launcher(kernel, grid):
        return lambda *args, **options: found.append(kernel.__name__)

    for backend in ("cuda", "triton"):
        able = YES if backend in ("triton", request.param) else Support(False, "it is not under test")
        monkeypatch.setitem(table.AVAILABILITY, backend, lambda able=able: able)
    for module in (bitmask_linear, nm_linear, nm_q4_linear):
        monkeypatch.setattr(module, "raw", raw)
    for op, name in CALLS.items():
        monkeypatch.setattr(formats, name, dispatcher(op, OPS[op].reference))
    monkeypatch.setattr(decode, "is_built", lambda op: True)
    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr(devices, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_common, "_device", lambda index: _common.Device((9, 0), 132))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for owner, names in ((torch.Tensor, ("cpu", "numpy", "tolist", "record_stream", "pin_memory")), (torch.cuda, ("synchronize",))):
        for name in names:
            monkeypatch.setattr(owner, name, refused)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.Tensor, "is_cuda", True)
        yield found


def layer_of(format: str) -> SparseLinear:
    """A layer whose weight no product has checked."""
    linear = torch.nn.Linear(256, 32)
    linear.weight.data.fill_(0.5).view(-1, 8)[:, 1:] = 0
    return SparseLinear.from_linear(linear.bfloat16(), format)


@pytest.fixture(scope="module")
def layers() -> dict[str, SparseLinear]:
    return {format: layer_of(format) for format in LAYERS}


@pytest.mark.parametrize("format", LAYERS)
def test_nothing_but_launches(layers, launches, format):
    for tokens in (1, 16, 64):
        x = torch.ones(tokens, 1, 256, dtype=torch.bfloat16)
        with Capture():
            assert layers[format](x).shape == (tokens, 1, 32)
    assert launches or format.endswith("q4")  # of which only the C++ kernel of 2:4 is launched, else the reference runs


def test_the_first_product_outside_of_a_graph_reads_from_the_device(launches, monkeypatch):
    """So the test above would see such a read."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", False)
        layer = layer_of("bitmask")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with Capture(), pytest.raises(RefusedError):
        layer(torch.ones(1, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.cpu(),
        lambda x: x.to("meta"),
        lambda x: x.record_stream(None),
        lambda x: torch.tensor([1]),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_the_capture_refuses(launches, wrong):
    with Capture(), pytest.raises(RefusedError):
        wrong(torch.ones(()))


@pytest.mark.parametrize("format", ["bitmask", "2:4-q4"])
def test_a_compiled_layer_is_one_operation(layers, format):
    """In one graph, so that what `mode="reduce-overhead"` captures is what the tests above run."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    layer, x = layers[format], torch.ones(3, 256, dtype=torch.bfloat16)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    assert graphs == [[f"sparsekern.{LAYERS[format]}.default"]]
