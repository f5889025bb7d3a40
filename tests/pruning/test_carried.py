"""Hidden states between a GPU and host memory: every wait is there, and each is needed. The GPU is a fake."""

from __future__ import annotations

import pytest
import torch

from sparsekern import NM, Wanda
from sparsekern.pruning.blockwise.activations import Activations
from sparsekern.pruning.blockwise.carried import Carrier
from sparsekern.pruning.blockwise.observation import observed
from sparsekern.pruning.blockwise.shelf import Shelf
from sparsekern.pruning.plan import Request, plan_linears
from sparsekern.pruning.session import batches_for
from tests.models.fake_device import COMPUTATION, FakeDevice, Memory, RaceError
from tests.models.families import tiny_ids, tiny_model

BATCHES, BLOCKS = 4, 3
CPU = torch.device("cpu")  # which stands for the GPU
VALUES = [torch.randn(5, 7, generator=torch.Generator().manual_seed(number)) for number in range(BATCHES)]
TAKEN = 256  # of pinned memory, for 140 bytes


def forwards(device, shelf, order=None):
    """Run blocks that add 1 over all batches. Each batch runs twice in a block: to be looked at, and to go on.

    `order` is that in which they are looked at, none of them expected; None is one after another, each expected.
    """
    for number, values in enumerate(VALUES):
        tensor = device.computed(values)
        shelf.put(number, tensor)
        device.release(tensor)
    for _ in range(BLOCKS):
        for goes_on in (False, True):
            for number in range(BATCHES) if goes_on or order is None else order:
                hidden = shelf.get(number)
                if goes_on or order is None:
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
        assert torch.equal(shelf.rows(number, torch.tensor([3, 0])), found[-1][[3, 0]]) and shelf.shape(number) == (5, 7)
    return found


@pytest.mark.parametrize("order", [None, (2, 0, 3, 1, 1, 2)], ids=["in order", "out of order"])
@pytest.mark.parametrize("limit", [0, TAKEN, 2 * TAKEN + 1, 100 * TAKEN])
def test_tensors_go_and_come_back_whole(limit, order, tmp_path):
    device = FakeDevice()
    shelf = Shelf(limit, tmp_path, Carrier(device, CPU))
    for found, values in zip(forwards(device, shelf, order), VALUES, strict=True):
        torch.testing.assert_close(found, values + BLOCKS)
    assert shelf.in_memory == min(limit // TAKEN, BATCHES) * TAKEN


@pytest.mark.parametrize("limit", [0, 100 * TAKEN], ids=["file", "memory"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("follow", "the copies reads bytes that the computation may still use"),
        ("lent", "the computation writes bytes that the copies may still use"),
        ("wait", "the computation reads bytes that the copies may still use"),
        ("used", "the copies writes bytes that the computation may still use"),
    ],
)
def test_each_wait_is_needed(missing, message, limit, tmp_path):
    deaf = type("Deaf", (FakeDevice,), {missing: lambda self, *what: None})()
    with pytest.raises(RaceError, match=message):
        forwards(deaf, Shelf(limit, tmp_path, Carrier(deaf, CPU)))


@pytest.mark.parametrize("limit", [0, 100 * TAKEN], ids=["file", "memory"])
def test_the_host_reads_nothing_that_it_has_not_waited_for(limit, tmp_path):
    deaf = type("Deaf", (FakeDevice,), {"finish": lambda self, *what: None})()
    shelf = Shelf(limit, tmp_path, Carrier(deaf, CPU))
    for number, values in enumerate(VALUES):
        shelf.put(number, deaf.computed(values))
    assert not torch.equal(shelf.rows(0, torch.arange(5)), VALUES[0])


def test_the_host_waits_only_for_what_it_reads(tmp_path):
    device = FakeDevice()
    shelf = Shelf(100 * TAKEN, tmp_path, Carrier(device, CPU))
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


@pytest.mark.parametrize("limit", [0, 100 * TAKEN])
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


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (3, 4), (4096, 4096), (4097, 8192), (134_217_729, 2**28)])
def test_pinned_memory_is_counted_as_torch_takes_it(size, taken):
    assert Carrier.taken(size) == taken


class Adopting(FakeDevice):
    """A device that knows the memory of a real computation too."""

    def _memory_of(self, tensor):
        try:
            return super()._memory_of(tensor)
        except StopIteration:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._memories.append(Memory(whole, COMPUTATION))
            return self._memories[-1]


@pytest.mark.parametrize("limit", [0, 10**6], ids=["file", "memory"])
def test_a_batch_is_brought_ahead_only_where_batches_go_in_order(limit, tmp_path):
    """Tuning runs them in another order: what came ahead would wait on the GPU, in the end all batches."""
    device = Adopting()
    model, method, shelf = tiny_model("llama"), Wanda(), Shelf(limit, tmp_path, Carrier(device, CPU))
    batches = batches_for(model, method, tiny_ids(6, 16), 1)
    request = Request(pattern=NM(2, 4), calibration=tiny_ids(6, 16))
    plan = observed(model, plan_linears(model, method, request).calibrated(request.rules), batches)
    activations = Activations(model, batches, plan.course, shelf)
    ahead = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ahead.append(list(shelf._returning)))
    with torch.no_grad():
        for number in (2, 0, 5, 1, 3, 4):
            activations.chain.run(number, 0)
        assert ahead == [[]] * 6
        activations.advance(0)
    assert ahead[6:] == [[1], [2], [3], [4], [5], [0]]


def test_tensors_of_the_host_stay_there(tmp_path):
    device = FakeDevice()
    shelf = Shelf(100 * TAKEN, tmp_path, Carrier(device, torch.device("meta")))
    shelf.put("a", VALUES[0])
    shelf.expect("a")
    assert torch.equal(shelf.get("a"), VALUES[0]) and not device._memories
