"""What the C++ products of a few tokens take, and what is left to Triton."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern import SparseLinear
from sparsekern.backends import bitmask_linear, decode, dispatcher, implementations, nm_linear, table
from sparsekern.backends.devices import YES
from sparsekern.layouts.packed_rows import pack_bitmask_rows, pack_nm_rows
from sparsekern.ops import OPS, _torch_op
from sparsekern.runtime import formats


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(decode, "is_built", lambda op: True)


def support_of(op: str, *arguments):
    (known,) = (known for known in implementations(op) if known.name == "cuda")
    return known.supports(*arguments)


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.only_on_cuda])
def test_every_implementation_supports_a_sample_of_its_op(op, generator):
    """Or the tests on a device would not run it."""
    samples = list(OPS[op].samples(generator))
    for known in implementations(op):
        assert any(known.supports(*sample.args, **sample.kwargs).ok for sample in samples), known.name


@pytest.mark.parametrize(
    ("tokens", "columns", "dtype", "pattern", "reason"),
    [
        (16, 256, torch.bfloat16, (2, 4), ""),
        (17, 256, torch.bfloat16, (2, 4), "x has more than 16 tokens"),
        (0, 256, torch.bfloat16, (2, 4), "or none"),
        (1, 256, torch.float32, (2, 4), "x is float32, not of 16 bits"),
        (1, 192, torch.float16, (2, 4), "x has 192 input features, not a multiple of 128"),
        (1, 256, torch.float16, (1, 4), ""),
        (1, 384, torch.float16, (1, 4), "x has 384 input features, not a multiple of 256"),
        (1, 256, torch.float16, (3, 4), "the pattern is 3:4, not 2:4 or 1:4"),
        (1, 256, torch.float16, (1, 8), "the pattern is 1:8, not 2:4 or 1:4"),
    ],
)
def test_which_n_m_weights_the_kernel_takes(tokens, columns, dtype, pattern, reason):
    packed = pack_nm_rows(torch.zeros(4, columns, dtype=dtype), *pattern).values()
    found = support_of("nm_linear", torch.zeros(tokens, columns, dtype=dtype), *packed, *pattern)
    assert found.ok == (not reason) and reason in found.reason


def test_a_library_without_the_kernel(monkeypatch):
    monkeypatch.setattr(decode, "is_built", lambda op: False)
    packed = pack_bitmask_rows(torch.zeros(4, 64).half()).values()
    assert "built from another version" in support_of("bitmask_linear", torch.zeros(1, 64).half(), *packed).reason


def test_tokens_are_contiguous_and_padded_with_zeros():
    x = torch.randn(2, 3, 70)
    padded = decode.as_tokens(x, 64)
    assert padded.shape == (6, 128) and torch.equal(padded[:, :70], x.view(6, 70)) and not padded[:, 70:].any()
    assert decode.as_tokens(x[0].T.contiguous().T, 70).is_contiguous()


MOST_CALLS = {"bitmask": 31, "2:4": 27}  # of Python functions, by a call of a layer; each takes some 0.1 us


@pytest.mark.parametrize(
    ("format", "op", "module"), [("bitmask", "bitmask_linear", bitmask_linear), ("2:4", "nm_linear", nm_linear)]
)
def test_a_call_of_a_layer_makes_few_calls(format, op, module, monkeypatch):
    """All that runs in Python before the launch, which is stubbed: the layer, the choice among implementations, the checks."""
    linear = torch.nn.Linear(256, 32, bias=False, dtype=torch.bfloat16)
    linear.weight.data.view(-1, 4)[:, ::2] = 0
    layer, x, launches = SparseLinear.from_linear(linear, format), torch.ones(1, 256, dtype=torch.bfloat16), []
    monkeypatch.setitem(table.AVAILABILITY, "cuda", lambda: YES)
    monkeypatch.setattr(module, "raw", lambda op: lambda x, *arguments: launches.append(op) or x.new_zeros(1, 32))
    monkeypatch.setattr(formats, op.upper(), dispatcher(op, OPS[op].reference))
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    with torch.no_grad():
        layer(x)  # checks the weight
        sys.setprofile(profile)
        layer(x)
        sys.setprofile(None)
    assert launches == [op, op] and 0 < calls <= MOST_CALLS[format]


class OnDevice:
    """Passes for a CUDA tensor."""

    is_cuda = True
    requires_grad = False


def test_plain_tensors_of_a_device_go_past_the_dispatcher(monkeypatch):
    run = _torch_op.without_autograd(OPS["nm_mask"].overload, lambda *args: "direct")
    monkeypatch.setattr(_torch_op, "_is_plain", lambda x: True)
    with torch.no_grad():
        assert run(OnDevice(), 2, 4) == "direct"
        assert isinstance(run(torch.rand(2, 4), 2, 4), torch.Tensor)
        monkeypatch.setattr(_torch_op, "_is_plain", lambda x: False)
        with pytest.raises(RuntimeError):
            run(OnDevice(), 2, 4)


def test_what_is_plain():
    x = torch.ones(2)
    assert _torch_op._is_plain(x) and _torch_op._is_plain(torch.nn.Parameter(x))
    seen = []
    with TorchDispatchMode():
        seen.append(_torch_op._is_plain(x))
    with torch.autocast("cpu"):
        seen.append(_torch_op._is_plain(x))
    torch.func.vmap(lambda row: seen.append(_torch_op._is_plain(x)) or row)(torch.ones(2, 2))
    assert seen == [False, False, False]
    assert not _torch_op._is_plain(torch.ones(2).as_subclass(type("Own", (torch.Tensor,), {})))
