"""Streamed runs within a limit of memory: what does not fit is kept on disk, and the result is the same."""

import re

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.models.limits import memory_limit
from sparsekern.models.streaming import stream_of
from sparsekern.pruning import memory
from sparsekern.pruning.blockwise import experts
from sparsekern.pruning.blockwise.shelf import Shelf
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_streaming import folder_of, of
from tests.pruning.test_streamed import equal, tensors_of

IDS = tiny_ids(60, 16)


def loaded(folder):
    return sparsekern.load(folder, device="cpu", stream=True)


def least(call):
    """Return the limit that the refusal of a low one asks for."""
    with pytest.raises(ValueError, match=r"max_memory: expected at least") as error:
        call("1MB")
    return re.search(r"at least ([\d,.]+) MB", str(error.value))[1].replace(",", "") + "MB", str(error.value)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_hidden_states_beyond_the_limit_are_on_disk_and_the_bits_are_the_same(kind, tmp_path, monkeypatch):
    folder = folder_of(kind, tmp_path / "model")
    written, groups = [], []
    write, of_groups = Shelf._write, experts.ExpertStatistics.groups
    monkeypatch.setattr(Shelf, "_write", lambda self, key, tensor: written.append(key) or write(self, key, tensor))
    monkeypatch.setattr(experts.ExpertStatistics, "groups", lambda self, most: groups.append(most) or of_groups(self, most))

    def run(out, limit):
        options = {"out": tmp_path / out, "batch_size": 4, "progress": False, "max_memory": limit}
        return sparsekern.prune(loaded(folder), "sparsegpt", "2:4", IDS, **options)

    run("whole", None)
    assert not written
    needed, message = least(lambda limit: run("never", limit))
    assert not (tmp_path / "never").exists()
    assert all(part in message for part in ("for the program", "outside the blocks", "for two blocks", "got 1.0 MB"))
    needed, message = least(lambda _: run("never", needed))  # enough for the model, not for the rest
    assert (
        all(part in message for part in ("a batch in a block", "the statistics of a block", "solving a linear"))
        and not (tmp_path / "never").exists()
    )
    run("limited", needed)
    assert len(written) > 15  # of each batch, at each block
    assert equal(tensors_of(tmp_path / "limited"), tensors_of(tmp_path / "whole"))
    if kind == "mixtral":
        assert any(isinstance(key, tuple) for key in written)  # what experts are called with
        assert max(groups[-3:]) < experts.EXPERT_BYTES


@pytest.mark.parametrize(
    ("value", "expected"), [(10, 10), ("10", 10), ("1.5 kB", 1500), ("8GB", 8 * 10**9), ("8 gib", 8 << 30), ("2TB", 2 * 10**12)]
)
def test_limits_are_bytes_or_texts(value, expected):
    assert memory_limit(value) == expected and memory_limit(None) is None


@pytest.mark.parametrize("value", ["", "GB", "8 apples", "-1GB", "0", "0.5B", "1e9", 0, -5])
def test_other_texts_are_no_limits(value):
    with pytest.raises(ValueError, match=r"max_memory: expected bytes or a text such as '8GB', got"):
        memory_limit(value)


@pytest.mark.parametrize("value", [True, 1.5, [8]])
def test_other_types_are_no_limits(value):
    with pytest.raises(TypeError, match=r"max_memory: expected bytes or a text such as '8GB', got"):
        memory_limit(value)


def test_only_a_streamed_model_has_a_limit(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"max_memory: expected a streamed model, got one in memory"):
        sparsekern.prune(model, "magnitude", out=tmp_path / "out", max_memory="8GB", progress=False)
    with pytest.raises(ValueError, match=r"max_memory: expected a streamed model, got one in memory"):
        sparsekern.perplexity(model, tiny_ids(), length=8, max_memory="8GB")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_forwards_are_replayed_is_refused(tmp_path):
    config = tf.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
    torch.manual_seed(0)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"max_memory: expected None for T5ForConditionalGeneration, whose blocks take more than"):
        sparsekern.prune(
            loaded(tmp_path / "model"), "wanda", "2:4", tiny_ids(2, 8), out=tmp_path / "out", max_memory="8GB", progress=False
        )
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_perplexity_takes_as_many_windows_at_once_as_fit(tmp_path, monkeypatch):
    of(tf.LlamaConfig(**{**tiny_model("llama").config.to_dict(), "num_hidden_layers": 3})).save_pretrained(tmp_path / "model")
    ids = tiny_ids(60, 32)
    expected = sparsekern.perplexity(loaded(tmp_path / "model"), ids, length=32)
    needed, message = least(lambda limit: sparsekern.perplexity(loaded(tmp_path / "model"), ids, length=32, max_memory=limit))
    assert "the hidden states of a window" in message
    model = loaded(tmp_path / "model")
    load, read = stream_of(model)._load, []
    monkeypatch.setattr(stream_of(model), "_load", lambda names: read.append(stream_of(model).names.index(names)) or load(names))
    assert sparsekern.perplexity(model, ids, length=32, max_memory=needed) == expected
    assert len(read) > 3 * 3 and set(read) == {0, 1, 2}


@pytest.mark.parametrize(("leaves", "parts"), [(1, 2), (2, 2), (8, 4)])
def test_partial_sums_are_counted_where_there_are_more_of_them_than_a_gram_matrix_and_its_factor(
    leaves, parts, tmp_path, monkeypatch
):
    needs, counted = {}, memory.room_beside
    monkeypatch.setattr(memory, "room_beside", lambda model, limit, found=None: needs.update(found) or counted(model, limit, found))
    folder = folder_of("llama", tmp_path / "model")
    options = {"out": tmp_path / "out", "batch_size": 4, "progress": False, "max_memory": "8GB", "leaves": leaves}
    report = sparsekern.prune(loaded(folder), "sparsegpt", "2:4", IDS, **options)
    block = {layer.name: layer.shape[1] for layer in report.layers if layer.name.startswith("model.layers.0.")}
    grams = [block[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    assert needs[memory.STATISTICS] == parts * sum(4 * features**2 for features in grams)
