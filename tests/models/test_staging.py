"""Copies of blocks to a GPU through pinned memory: every wait is there, and each is needed. The GPU is a fake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparsekern
from sparsekern.models.staging import Staging
from sparsekern.models.stored_reading import Stamps
from sparsekern.models.streaming import stream_of
from sparsekern.models.weight_files import tensors_in
from tests.models.fake_device import POISON, FakeDevice, RaceError
from tests.models.families import tiny_ids
from tests.models.test_streaming import folder_of

TENSORS = {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(40, dtype=torch.uint8),
    "half": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "wide": torch.randn(9, 31, generator=torch.Generator().manual_seed(1)),
}


def reading(device, stamps):
    def read(entry, begin, room):
        device.host_writes(room)
        stamps.read_into(entry, begin, room)

    return read


def stored_in(folder: Path):
    save_file(TENSORS, folder / "block.safetensors")
    return tensors_in([folder / "block.safetensors"])


def two_blocks(device, stored, size):
    """Load a block, compute with it, release it, and load another, which gets its memory."""
    staging, read = Staging(device, size), reading(device, Stamps(entry.path for entry in stored.values()))
    found = []
    for _ in range(2):
        tensors = staging.arrived(staging.load(stored, read))
        for tensor in tensors.values():
            device.computes_with(tensor)
        found.append({name: tensor.clone() for name, tensor in tensors.items()})
        for tensor in tensors.values():
            device.release(tensor)
    staging.close()
    return found


@pytest.mark.parametrize("size", [1, 16, 100, 1 << 20])
def test_tensors_arrive_whole_through_memory_of_any_size(size, tmp_path):
    device = FakeDevice()
    for found in two_blocks(device, stored_in(tmp_path), size):
        assert found.keys() == TENSORS.keys()
        assert all(found[name].dtype == own.dtype and torch.equal(found[name], own) for name, own in TENSORS.items())
    total = 2 * sum(tensor.nbytes for tensor in TENSORS.values())
    assert device.finished == max(0, -(-total // size) - 2) + 1  # for each part but the first two, and to close


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("wait", "the computation reads bytes that the copies may still use"),
        ("finish", "the host writes bytes that the copies may still use"),
        ("used", "the copies writes bytes that the computation may still use"),
    ],
)
def test_each_wait_is_needed(missing, message, tmp_path):
    deaf = type("Deaf", (FakeDevice,), {missing: lambda self, what: None})
    with pytest.raises(RaceError, match=message):
        two_blocks(deaf(), stored_in(tmp_path), 64)


def test_an_event_in_front_of_the_last_copy_is_too_early(tmp_path):
    class Early(FakeDevice):
        def copied(self):
            event = super().copied()
            return event | {"the copies": max(0, event["the copies"] - 1)}

    with pytest.raises(RaceError, match="may still use"):
        two_blocks(Early(), stored_in(tmp_path), 1 << 20)


def test_without_a_wait_the_values_are_not_there_either(tmp_path):
    device, stored = FakeDevice(), stored_in(tmp_path)
    staging = Staging(device)
    staged = staging.load(stored, reading(device, Stamps(entry.path for entry in stored.values())))
    assert (staged.tensors["wide"].view(torch.uint8) == POISON).all()
    assert torch.equal(staging.arrived(staged)["wide"], TENSORS["wide"])


def test_a_file_that_ends_early_is_refused(tmp_path):
    stored = stored_in(tmp_path)
    stamps, entry = Stamps(entry.path for entry in stored.values()), stored["wide"]
    with pytest.raises(ValueError, match=r"block\.safetensors can no longer be read: it ends before byte"):
        stamps.read_into(entry, entry.nbytes, torch.empty(10**4, dtype=torch.uint8))
    entry.path.unlink()
    with pytest.raises(ValueError, match=r"block\.safetensors can no longer be read: .*No such file"):
        stamps.read_into(entry, 0, torch.empty(1, dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_streamed_run_through_staging_makes_the_same_bits(kind, tmp_path, monkeypatch):
    folder, device = folder_of(kind, tmp_path / "model", "20KB"), FakeDevice()
    read_into = Stamps.read_into

    def read(self, entry, begin, room):
        device.host_writes(room)
        read_into(self, entry, begin, room)

    found = []
    for staged in (False, True):
        model = sparsekern.load(folder, device="cpu", stream=True)
        if staged:
            monkeypatch.setattr(stream_of(model), "_staging", Staging(device, 1000))
            monkeypatch.setattr(Stamps, "read_into", read)
        sparsekern.prune(model, "wanda", "2:4", tiny_ids(), out=tmp_path / str(staged), progress=False)
        found.append(sorted((path.name, path.read_bytes()) for path in (tmp_path / str(staged)).glob("*.safetensors")))
    assert found[0] == found[1] and device.finished
