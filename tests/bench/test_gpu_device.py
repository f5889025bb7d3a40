"""The device of `python -m bench.gpu`, where there is none."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import device


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


def test_memory_is_given_back_but_for_a_capture_that_failed(monkeypatch):
    """torch before 2.12 takes one for a capture under way."""
    said = []

    def refuse():
        raise RuntimeError(said[-1])

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    device.give_memory_back(torch.device("cpu"))
    said.append("captures_underway.empty() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")
    device.give_memory_back(torch.device("cuda"))
    said.append("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.give_memory_back(torch.device("cuda"))
