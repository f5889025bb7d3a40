"""What a GPU would feel of the pipeline, counted on a CPU: how often it waits for a value, and how much runs at once."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern
from sparsekern.methods.statistics import bf16_pieces
from sparsekern.pruning.batches import Batch, as_batches, tokens_per_batch
from sparsekern.pruning.progress import Clock
from tests.tiny import llama

GIB = 1 << 30


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a value on a device. What happens inside of the ops is not seen."""

    WAITING = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero")

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self._read() or tolist(tensor))

    def _read(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITING):
            self._read()
        return func(*args, **(kwargs or {}))


def reads(monkeypatch, method: str, blocks: int, batches: int, padded: bool) -> int:
    model = llama(num_hidden_layers=blocks)
    ids = torch.randint(320, (2 * batches, 16))
    calibration = ids
    if padded:
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        calibration = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]
    with monkeypatch.context() as patch, Reads(patch) as seen:
        sparsekern.prune(model, method, "2:4", calibration, batch_size=None if padded else 2, progress=False)
    return seen.count


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("method", "a_linear", "a_group"), [("sparsegpt", 3, 3), ("wanda", 2, 1)])
@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
def test_no_batch_of_a_block_waits_for_a_value(monkeypatch, method, a_linear, a_group, padded):
    count = {(blocks, batches): reads(monkeypatch, method, blocks, batches, padded) for blocks in (1, 2, 3) for batches in (2, 5)}
    for batches in (2, 5):
        # A linear: its weights are finite, its outcome, and for SparseGPT whether it has zeros already. A group: dead features, and for
        # SparseGPT the damping and the shift. A block: how many zeros came back.
        assert count[3, batches] - count[2, batches] == 7 * a_linear + 4 * a_group + 1
    assert count[3, 5] - count[3, 2] == count[2, 5] - count[2, 2]


@pytest.mark.parametrize(
    ("memory", "tokens"),
    [(None, 2048), (4 * GIB, 2048), (16 * GIB, 4096), (24 * GIB, 4096), (79 * GIB, 16384), (140 * GIB, 32768), (2**42, 32768)],
)
def test_a_batch_is_as_large_as_the_memory_allows(memory, tokens):
    assert tokens_per_batch(memory) == tokens


def test_batches_on_a_cpu_stay_small():
    batches = as_batches(torch.zeros(9, 512, dtype=torch.long), None, torch.device("cpu"), None)
    assert [batch.shape[0] for batch in batches] == [4, 4, 1]


def test_rows_of_real_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, 0, mask)
    for shape in ((2, 3, 4), (6, 4), (2, 3, 5, 4)):
        rows, row_mask = batch.flatten(torch.randn(shape))
        assert batch.used(len(rows)) == row_mask.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_of_pieces_is_as_good_as_sixteen_bits(generator, dtype):
    a, b = torch.randn(40, 200, generator=generator).to(dtype), torch.randn(200, 60, generator=generator).triu() * 100
    exact = a.double() @ b.double()
    pieces = bf16_pieces(a, b)
    assert all(piece.dtype == torch.bfloat16 for piece in pieces)
    error = (pieces[0].double() @ pieces[1].double() - exact).norm() / exact.norm()
    assert error < 2**-16


def test_a_clock_adds_up_phases_and_survives_an_error(monkeypatch):
    readings = iter([1.0, 2.0, 10.0, 14.0, 20.0, 21.0, 36.0, 40.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    clock = Clock(torch.device("cpu"))
    with clock.phase("a"):
        pass
    with pytest.raises(ValueError), clock.phase("a"):
        raise ValueError
    with clock.phase("b"):
        assert clock.now() == 21
    assert clock.seconds == {"a": 1 + 4, "b": 16} and clock.now() == 40
