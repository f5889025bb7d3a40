"""Tensors that are kept in memory up to a limit, and in a nameless file beyond it."""

import errno
import os

import pytest
import torch

from sparsekern.pruning.blockwise.shelf import Shelf
from sparsekern.pruning.blockwise.stand_ins import SharedTensors


def filled(limit, folder, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shelf, tensors = Shelf(limit, folder), {}
    for key, rows in (("a", 2), ("b", 3000), ("c", 1), ("d", 3000)):
        tensors[key] = (torch.randn(rows, 7, generator=generator) * 5).to(dtype)
        shelf.put(key, tensors[key])
    return shelf, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("limit", [None, 0, 100, 10**9])
def test_a_tensor_comes_back_whole_and_by_rows(limit, dtype, tmp_path):
    shelf, tensors = filled(limit, tmp_path, dtype)
    for key, tensor in tensors.items():
        assert torch.equal(shelf.get(key), tensor) and shelf.get(key).dtype == dtype
        for rows in ([], [0], [len(tensor) - 1, 0, 0]):
            assert torch.equal(shelf.rows(key, torch.tensor(rows, dtype=torch.int64)), tensor[rows])


def test_no_more_than_the_limit_stays_in_memory_and_the_file_has_no_name(tmp_path):
    shelf, tensors = filled(100, tmp_path)
    assert shelf.in_memory == tensors["a"].nbytes + tensors["c"].nbytes <= 100
    assert os.listdir(tmp_path) == []
    shelf.drop("a")
    assert shelf.in_memory == tensors["c"].nbytes
    with pytest.raises(KeyError):
        shelf.get("a")


@pytest.mark.parametrize("limit", [None, 0, 10**9])
def test_a_shape_is_told_without_reading(limit, tmp_path, monkeypatch):
    shelf, tensors = filled(limit, tmp_path)
    monkeypatch.delattr(Shelf, "get")
    monkeypatch.delattr(Shelf, "_transfer")
    assert all(shelf.shape(key) == tensor.shape for key, tensor in tensors.items())


def test_what_the_first_batch_is_called_with_counts_as_well(tmp_path):
    """Such as a mask of four dimensions, which is larger than the hidden states."""
    mask, later = torch.zeros(2, 1, 9, 9), torch.ones(2, 1, 9, 9)
    for limit, in_memory in ((None, 0), (mask.nbytes, mask.nbytes), (mask.nbytes - 1, 0)):
        shelf = Shelf(limit, tmp_path)
        shared = SharedTensors(shelf)
        kept = shared.place(mask)
        assert shelf.in_memory == in_memory and torch.equal(kept.get(), mask)
        shared.next_batch()
        assert shared.place(mask.clone()) is kept and torch.equal(shared.place(later).get(), later)


def test_a_new_tensor_takes_the_place_of_the_old_one(tmp_path):
    shelf, tensors = filled(0, tmp_path)
    size = os.fstat(shelf._file.fileno()).st_size
    for _ in range(3):
        shelf.put("b", tensors["b"] + 1)
        shelf.put("d", tensors["d"].T)
    assert torch.equal(shelf.get("b"), tensors["b"] + 1) and torch.equal(shelf.get("d"), tensors["d"].T)
    assert os.fstat(shelf._file.fileno()).st_size == size


def test_a_full_disk_says_what_needs_how_much(tmp_path, monkeypatch):
    shelf = Shelf(0, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf, "_transfer", full)
    with pytest.raises(
        OSError, match=r"No space left on device: .* needs 8,192 bytes for hidden states that do not stay in memory"
    ) as error:
        shelf.put("a", torch.zeros(1025))
    assert error.value.errno == errno.ENOSPC
