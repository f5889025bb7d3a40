"""Hidden states between a GPU and host memory: every wait is there, and each is needed. The GPU is a fake."""

from __future__ import annotations

import pytest
import torch

from sparsekern.pruning.blockwise.carried import Carrier
from sparsekern.pruning.blockwise.shelf import Shelf
from tests.models.fake_device import FakeDevice, RaceError

BATCHES, BLOCKS = 4, 3
CPU = torch.device("cpu")  # which stands for the GPU
VALUES = [torch.randn(5, 7, generator=torch.Generator().manual_seed(number)) for number in range(BATCHES)]
SIZE = VALUES[0].nbytes


def forwards(device, shelf):
    """Run blocks that add 1 over all batches. Each batch runs twice in a block: to be looked at, and to go on."""
    for number, values in enumerate(VALUES):
        tensor = device.computed(values)
        shelf.put(number, tensor)
        device.release(tensor)
    for _ in range(BLOCKS):
        for goes_on in (False, True):
            for number in range(BATCHES):
                hidden = shelf.get(number)
                shelf.expect((number + 1) % BATCHES)
                device.computes_with(hidden)
                output = device.computed(hidden + 1)
                device.release(hidden)
                if goes_on:
                    shelf.put(number, output)
                device.release(output)
    found = []
    for number in range(BATCHES):
        found.append(shelf.get(number).clone())
        assert torch.equal(shelf.rows(number, torch.tensor([3, 0])), found[-1][[3, 0]])
    return found


@pytest.mark.parametrize("limit", [0, SIZE, 2 * SIZE + 1, 100 * SIZE])
def test_tensors_go_and_come_back_whole(limit, tmp_path):
    device = FakeDevice()
    shelf = Shelf(limit, tmp_path, Carrier(device, CPU))
    for found, values in zip(forwards(device, shelf), VALUES, strict=True):
        torch.testing.assert_close(found, values + BLOCKS)
    assert shelf.in_memory <= limit


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("follow", "the copies reads bytes that the computation may still use"),
        ("lent", "the computation writes bytes that the copies may still use"),
        ("wait", "the computation reads bytes that the copies may still use"),
        ("used", "the copies writes bytes that the computation may still use"),
    ],
)
def test_each_wait_is_needed(missing, message, tmp_path):
    deaf = type("Deaf", (FakeDevice,), {missing: lambda self, *what: None})()
    with pytest.raises(RaceError, match=message):
        forwards(deaf, Shelf(100 * SIZE, tmp_path, Carrier(deaf, CPU)))


def test_the_host_waits_only_for_what_it_reads(tmp_path):
    device = FakeDevice()
    shelf = Shelf(100 * SIZE, tmp_path, Carrier(device, CPU))
    shelf.put("a", device.computed(VALUES[0]))
    shelf.expect("a")
    assert torch.equal(shelf.get("a"), VALUES[0]) and not device.finished
    shelf.rows("a", torch.tensor([1]))
    assert device.finished == 1
    on_disk = Shelf(0, tmp_path, Carrier(device, CPU))
    on_disk.put("a", device.computed(VALUES[0]))
    assert device.finished == 1  # until the next one leaves
    on_disk.put("b", device.computed(VALUES[1]))
    assert device.finished == 2
    assert torch.equal(on_disk.get("b"), VALUES[1]) and torch.equal(on_disk.get("a"), VALUES[0])


@pytest.mark.parametrize("limit", [0, 100 * SIZE])
def test_a_tensor_that_is_on_its_way_may_be_replaced_or_dropped(limit, tmp_path):
    device = FakeDevice()
    shelf = Shelf(limit, tmp_path, Carrier(device, CPU))
    shelf.put("a", device.computed(VALUES[0]))
    shelf.expect("a")
    shelf.put("a", device.computed(VALUES[1]))
    assert torch.equal(shelf.get("a"), VALUES[1])
    shelf.put("b", device.computed(VALUES[2]))
    shelf.drop("b")
    shelf.expect("b")  # which is nowhere
    with pytest.raises(KeyError):
        shelf.get("b")
    assert torch.equal(shelf.get("a"), VALUES[1])


def test_tensors_of_the_host_stay_there(tmp_path):
    device = FakeDevice()
    shelf = Shelf(100 * SIZE, tmp_path, Carrier(device, torch.device("meta")))
    shelf.put("a", VALUES[0])
    shelf.expect("a")
    assert torch.equal(shelf.get("a"), VALUES[0]) and not device._memories
