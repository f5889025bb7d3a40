"""The device of `python -m bench.gpu`, where there is none."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bench.gpu import device

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "is built without CUDA; run with a Python whose torch has it"),
        ("13.0", "has CUDA 13.0 but sees no device; is there a GPU, and does its driver fit?"),
    ],
)
def test_what_is_wrong_with_cuda_is_told(monkeypatch, version, message):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in device.problem_with_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.problem_with_cuda() is None


def raising(message):
    def call(*args):
        raise RuntimeError(message)

    return call


def test_memory_is_given_back_but_for_a_capture_that_failed(monkeypatch):
    """torch before 2.12 takes one for a capture under way."""
    monkeypatch.setattr(torch.cuda, "empty_cache", raising("captures_underway.empty() INTERNAL ASSERT FAILED"))
    device.give_memory_back(CUDA)
    monkeypatch.setattr(torch.cuda, "empty_cache", raising("CUDA error: an illegal memory access was encountered"))
    device.give_memory_back(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.give_memory_back(CUDA)


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch):
    """Torch says so in an error with `capture` in it; any other error is the call's own."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    stubs = {"CUDAGraph": object, "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "graph", raising("CUDA error: operation not permitted when stream is capturing"))
    assert device.replayed_seconds_of([lambda: None], CUDA) is None
    monkeypatch.setattr(torch.cuda, "graph", raising("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.replayed_seconds_of([lambda: None], CUDA)
