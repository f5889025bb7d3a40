"""What a streamed run reads and writes: each block little more than once, one after another, and nothing is lost by a full disk."""

import errno
import warnings

import pytest
import transformers as tf

import sparsekern
from sparsekern._warnings import SparsekernWarning
from sparsekern.models.streaming import stream_of
from sparsekern.models.zeros import count_stored
from sparsekern.pruning.store import InFolder
from tests.models.families import LLAMA_LIKE, tiny_ids
from tests.models.test_streaming import folder_of, of
from tests.pruning.test_streamed import equal, pruned, tensors_of


def watched(model, monkeypatch):
    """Return a list of what the thread for files does: `("read", block)` and `("write", name)`."""
    stream, done = stream_of(model), []
    load, put = stream._load, InFolder.put
    monkeypatch.setattr(stream, "_load", lambda names: done.append(("read", stream.names.index(names))) or load(names))
    monkeypatch.setattr(InFolder, "put", lambda self, name, *rest: done.append(("write", name)) or put(self, name, *rest))
    return done


def test_each_block_is_read_once_and_the_first_of_a_kind_once_more(tmp_path, monkeypatch):
    of(tf.LlamaConfig(**{**LLAMA_LIKE, "num_hidden_layers": 12})).save_pretrained(tmp_path / "model")
    model = sparsekern.load(tmp_path / "model", device="cpu", stream=True)
    done = watched(model, monkeypatch)
    source = stream_of(model).size()
    sparsekern.prune(model, "wanda", "2:4", tiny_ids(2, 8), out=tmp_path / "out", progress=False)
    read = [index for what, index in done if what == "read"]
    assert sorted(read) == sorted([0, *range(12)])
    outside = sum(stream_of(model).stored[name].nbytes for name in stream_of(model).outside)  # copied at the end
    assert outside + sum(map(stream_of(model).size, read)) < 1.1 * source


def test_a_block_is_on_disk_before_the_next_but_one_is_read(tmp_path, monkeypatch):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    done = watched(model, monkeypatch)
    sparsekern.prune(model, "magnitude", "2:4", out=tmp_path / "out", progress=False)
    writes = [("write", f"block-{index:05d}") for index in range(3)]
    assert done == [("read", 0), ("read", 1), writes[0], ("read", 2), writes[1], writes[2]]


@pytest.mark.parametrize("full", [1, 2])
def test_a_full_disk_ends_the_run_and_the_finished_blocks_stay(full, tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model")
    pruned(folder, tmp_path / "whole", stream=True)
    put = InFolder.put

    def refused(self, name, *rest):
        if name == f"block-{full:05d}":
            raise OSError(errno.ENOSPC, "no space left while writing it; earlier files are intact", name)
        put(self, name, *rest)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left while writing it"):
        patched.setattr(InFolder, "put", refused)
        pruned(folder, tmp_path / "out", stream=True)
    assert len(list((tmp_path / "out" / "checkpoint").glob("*.safetensors"))) == full
    _, report = pruned(folder, tmp_path / "out", stream=True, resume=True)
    assert report.resumed_blocks == full
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_weights_that_are_read_without_a_call_stay_dense_as_in_memory(tmp_path):
    """Mamba's `dt_proj`, in every block: those after the first have lent weights while the model is observed."""
    of(tf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=3, state_size=4, time_step_rank=8)).save_pretrained(
        tmp_path / "model"
    )
    found = []
    for stream in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SparsekernWarning)
            _, report = pruned(tmp_path / "model", tmp_path / str(stream), stream=stream)
        said = [str(warning.message) for warning in caught if "reads this weight without calling" in str(warning.message)]
        found.append(([layer.name for layer in report.layers], said, tensors_of(tmp_path / str(stream))))
    assert found[0][:2] == found[1][:2] and len(found[0][1]) == 1 and not any("dt_proj" in name for name in found[0][0])
    assert equal(found[0][2], found[1][2])


def test_the_card_has_the_zeros_of_all_blocks(tmp_path):
    pruned(folder_of("llama", tmp_path / "model"), tmp_path / "whole", "magnitude", stream=False)
    pruned(tmp_path / "model", tmp_path / "streamed", "magnitude", stream=True)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("whole", "streamed")]
    rows = [next(line for line in card.splitlines() if "zeros in the whole model" in line) for card in cards]
    assert rows[0] == rows[1] and "0.00%" not in rows[0]
    model = sparsekern.load(tmp_path / "streamed", device="cpu", stream=True)
    expected = sum(int((tensor == 0).sum()) for tensor in tensors_of(tmp_path / "streamed").values())
    assert count_stored(model)[0] == expected


def test_the_files_are_the_same_wherever_the_folders_lie(tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    for out in ("before", "one"):
        pruned(folder, tmp_path / out, stream=True)
    first, other = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.name.startswith("model")}
        for out in ("before", "one")
    )
    assert len(first) > 3 and other == first
