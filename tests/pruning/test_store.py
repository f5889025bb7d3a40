"""The store of checkpoints and states: what it keeps, what it removes, and what it does not trust."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch
from safetensors import SafetensorError

from sparsekern import _files as files
from sparsekern.models import find_linears
from sparsekern.pruning.store import InFolder, InMemory, check_pruned, check_specs, digest_of
from sparsekern.reports.report import LayerReport


def in_folder(folder) -> InFolder:
    return InFolder(folder, "state", "do something")


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return InMemory() if request.param == "memory" else in_folder(tmp_path)


def test_entries_come_back(store):
    tensors = {"a/x": torch.arange(6).view(2, 3).t(), "a/y": torch.tensor([1.5]).bfloat16(), "b/x": torch.zeros(0, 2)}
    store.put("one", tensors, {"names": ["ä", "\ud800"], "error": float("inf")})
    store.put("other", {})
    assert store.holds("one") and not store.holds("on")
    found, note = store.get("one")
    assert note == {"names": ["ä", "\ud800"], "error": float("inf")} and store.get("other") == ({}, None)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert store.get("one", "a/")[0].keys() == {"x", "y"}
    store.put("one", {"z": torch.ones(1)})
    assert store.get("one")[0].keys() == {"z"}
    store.drop("o")
    assert not store.holds("one") and not store.holds("other")


def test_in_memory_it_keeps_copies():
    store, tensor = InMemory(), torch.ones(2)
    store.put("it", {"x": tensor})
    tensor.zero_()
    assert store.get("it")[0]["x"].tolist() == [1, 1]


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff" * 64])
def test_damaged_entries_are_named(tmp_path, content):
    store = in_folder(tmp_path)
    store.path("it").write_bytes(content)
    with pytest.raises(ValueError, match=r"state: .*it.safetensors is damaged \(.*\); do something"):
        store.get("it")


@pytest.mark.parametrize("metadata", [None, {}, {"note": "{"}])
def test_an_entry_without_a_note_is_damaged(tmp_path, metadata):
    from safetensors.torch import save_file

    store = in_folder(tmp_path)
    save_file({"x": torch.ones(1)}, store.path("it"), metadata)
    with pytest.raises(ValueError, match="is damaged"):
        store.get("it")


def test_what_killed_calls_left_is_removed(tmp_path):
    for name in (".block-00001.safetensors.123-0.tmp", ".tmpGr6yZz", ".training.safetensors.9.tmp"):
        (tmp_path / name).write_bytes(b"half")
    kept = {"notes.tmp", ".notes.tmp", ".tmp-notes", ".tmprc", ".lock", ".keep"}  # those of other programs among them
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    in_folder(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == kept


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_files_have_the_mode_of_the_umask(tmp_path):
    store, before = in_folder(tmp_path), os.umask(0o027)
    try:
        store.put("it", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.path("it").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_older_entry(tmp_path, monkeypatch):
    import safetensors.torch

    store = in_folder(tmp_path)
    store.put("it", {"x": torch.ones(1)})

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left while writing 4 bytes; earlier files are intact") as caught:
        store.put("it", {"x": torch.zeros(1)})
    assert caught.value.errno == errno.ENOSPC
    assert store.get("it")[0]["x"].tolist() == [1] and len(list(tmp_path.iterdir())) == 1


def test_an_entry_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The file, then its name, then the folder: or else a power cut takes an entry that was there."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    in_folder(tmp_path).put("it", {"x": torch.ones(1)})
    assert done == [(tmp_path / "it.safetensors").stat().st_ino, "name", tmp_path.stat().st_ino]


def test_digests_tell_settings_apart():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


WEIGHT = torch.tensor([[1.0, 0, 0, 2], [0, 3, 4, 0]])


def layer(**changes) -> LayerReport:
    return LayerReport(**{"name": "it", "pattern": "2:4", "shape": (2, 4), "zeros": 4, "error": None, "seconds": 0.0} | changes)


@pytest.mark.parametrize(
    ("weight", "report", "pattern", "message"),
    [
        (torch.ones(2, 4), layer(), "2:4", "here: it is not pruned to 2:4: 0 of 8 weights are zero"),
        (torch.ones(2, 4), layer(zeros=0), "2:4", "here: it is not pruned to 2:4: 0 of 8 weights are zero"),
        (torch.tensor([[1.0, 2, 3, 0], [0, 0, 0, 4]]), layer(), "2:4", "here: it is not pruned to 2:4: 4 of 8"),
        (WEIGHT, layer(zeros=3), "2:4", "here: it is not pruned to 2:4: 4 of 8 weights are zero"),
        (WEIGHT, layer(), "1:4", r"here: it: expected 1:4 of \(2, 4\), got 2:4 of \(2, 4\)"),
        (WEIGHT, layer(shape=(4, 2)), "2:4", r"here: it: expected 2:4 of \(2, 4\), got 2:4 of \(4, 2\)"),
        (WEIGHT / 0, layer(), "2:4", "here: it holds NaN or Inf"),
        (WEIGHT * torch.tensor(float("inf")), layer(), "2:4", "here: it holds NaN or Inf"),
        (torch.ones(20, 20), layer(pattern="0.5", shape=(20, 20), zeros=0), "0.5", "here: it is not pruned to 0.5: 0 of 400"),
        (WEIGHT, layer(name="that"), "2:4", "here holds reports of other linears than its weights"),
    ],
)
def test_weights_that_are_not_pruned_are_refused(weight, report, pattern, message):
    with pytest.raises(ValueError, match=message):
        check_pruned("here", {"it": weight}, [report], {"it": pattern})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_pruned_pass(dtype):
    check_pruned("here", {"it": WEIGHT.to(dtype)}, [layer()], {"it": "2:4"})
    by_row = torch.ones(5, 7, dtype=dtype)
    by_row[:, :2] = 0  # floor(0.3 * 7) of each row, less than floor(0.3 * 35)
    check_pruned("here", {"it": by_row}, [layer(pattern="0.3", shape=(5, 7), zeros=10)], {"it": "0.3"})
    check_pruned("here", {"it": torch.ones(2, 4)}, [layer(pattern="-0,-0", zeros=0)], {"it": "-0,-0"})


def test_names_shapes_and_dtypes_are_compared():
    linear = torch.nn.Linear(4, 2, bias=False)
    linears = find_linears(torch.nn.Sequential(linear))
    check_specs("here", {linears[0].name: linear.weight}, linears)
    for name, weight in ((linears[0].name, linear.weight.half()), (linears[0].name, linear.weight.t()), ("it", linear.weight)):
        with pytest.raises(ValueError, match="here holds other linears than the model's"):
            check_specs("here", {name: weight}, linears)
