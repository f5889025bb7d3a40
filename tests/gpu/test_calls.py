"""Each implementation of each op on a device: equal to the reference on the CPU, on any stream, captured, and without waiting."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.samples import on, outcome, samples, tensors
from sparsekern import backends
from sparsekern.ops._registry import OPS
from tests.ops.test_contracts import assert_bits_equal, assert_same

from .calls import CAPTURABLE, DEVICE, EVERY_CAPTURABLE, EVERY_IMPLEMENTATION, EVERYWHERE

pytestmark = pytest.mark.gpu

LONG = 50_000_000  # clock cycles, some 30 ms


def cpu(results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [result.cpu() for result in results]


def test_what_is_captured_is_known():
    assert set(CAPTURABLE) <= OPS.keys()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_as_it_is_chosen_it_equals_the_reference_on_the_cpu(name, poisoned):
    for sample in OPS[name].samples(torch.Generator().manual_seed(0)):
        expected = outcome(OPS[name], on(sample, "cpu"))
        assert_same(OPS[name], cpu(outcome(OPS[name], on(sample, DEVICE))), expected)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_reference_runs_on_a_device(name):
    for sample in OPS[name].samples(torch.Generator().manual_seed(0)):
        here, there = on(sample, "cpu"), on(sample, DEVICE)
        OPS[name].reference(*here.args, **here.kwargs)
        OPS[name].reference(*there.args, **there.kwargs)
        assert_same(OPS[name], cpu(tensors(there)), tensors(here))


@EVERY_IMPLEMENTATION
def test_it_equals_the_reference_on_the_cpu(name, backend, poisoned):
    assert samples(OPS[name], backend), "it supports none of the op's samples"
    for sample in samples(OPS[name], backend):
        expected = outcome(OPS[name], on(sample, "cpu"))
        assert_same(OPS[name], cpu(outcome(OPS[name], sample)), expected)


@EVERY_IMPLEMENTATION
def test_a_second_call_gives_the_same_bits(name, backend):
    for sample in samples(OPS[name], backend):
        first, second = (outcome(OPS[name], on(sample, DEVICE)) for _ in range(2))
        for got, want in zip(first, second, strict=True):
            assert_bits_equal(got, want)


@EVERY_IMPLEMENTATION
def test_it_runs_on_the_current_stream(name, backend, poisoned):
    """Behind a kernel that holds its stream up: on another stream the op would find its inputs unwritten."""
    stream = torch.cuda.Stream()
    for sample in samples(OPS[name], backend):
        expected = outcome(OPS[name], on(sample, DEVICE))
        source = on(sample, DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            results = outcome(OPS[name], on(source, DEVICE))
        stream.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_bits_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EVERY_IMPLEMENTATION
def test_it_runs_on_the_device_of_its_tensors(name, backend):
    for sample in samples(OPS[name], backend, "cuda:1"):
        with torch.cuda.device(0):
            results = outcome(OPS[name], on(sample, "cuda:1"))
        expected = outcome(OPS[name], on(sample, "cuda:0"))
        for got, want in zip(results, expected, strict=True):
            assert got.device == torch.device("cuda", 1)
            assert_bits_equal(got.cpu(), want.cpu())


@EVERY_CAPTURABLE
def test_without_value_checks_nothing_waits_for_the_device(name, backend):
    for sample in samples(OPS[name], backend):
        outcome(OPS[name], on(sample, DEVICE))  # compiles
        again = on(sample, DEVICE)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with backends.value_checks(False):
                outcome(OPS[name], again)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@EVERY_CAPTURABLE
def test_a_captured_call_is_replayed_on_new_values(name, backend):
    for sample in samples(OPS[name], backend):
        expected = outcome(OPS[name], on(sample, DEVICE))
        static, values = on(sample, DEVICE), on(sample, DEVICE)
        outcome(OPS[name], on(sample, DEVICE))  # compiles
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            results = outcome(OPS[name], static)
        for _ in range(2):
            for place, value in zip(tensors(static), tensors(values), strict=True):
                place.copy_(value)
            for result in results[: len(results) - len(tensors(static))]:
                result.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for got, want in zip(results, expected, strict=True):
                assert_bits_equal(got, want)
