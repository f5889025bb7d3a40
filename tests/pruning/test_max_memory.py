"""Streamed runs within a limit of memory: what does not fit is kept on disk, and the result is the same."""

import re

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.models.limits import memory_limit
from sparsekern.models.memory import needs_of
from sparsekern.models.streaming import stream_of
from sparsekern.pruning import memory
from sparsekern.pruning.blockwise import experts
from sparsekern.pruning.blockwise.shelf import Shelf
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_streaming import folder_of, of
from tests.pruning.test_streamed import equal, tensors_of
from tests.pruning.test_streamed_output import THEN, continued, removed, told

IDS = tiny_ids(60, 48)


def loaded(folder):
    return sparsekern.load(folder, device="cpu", stream=True)


def least(call):
    """Return the limit that the refusal of a low one asks for."""
    with pytest.raises(ValueError, match=r"max_memory: expected at least") as error:
        call("1MB")
    return least_of(error.value), str(error.value)


def least_of(error):
    return re.search(r"^max_memory: expected at least ([\d,.]+) MB", str(error))[1].replace(",", "") + "MB"


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
    parts = ("for the program", "outside the blocks", "for two blocks", ") and what the call", "got 1.0")
    assert all(part in message for part in parts)
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


def encoder_decoder(kind, folder):
    sizes = {"vocab_size": 96, "d_model": 16}
    if kind == "t5":
        config = tf.T5Config(**sizes, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2)
    else:
        ends = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = tf.BartConfig(**sizes, **ends, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)
    torch.manual_seed(0)
    (tf.T5ForConditionalGeneration if kind == "t5" else tf.BartForConditionalGeneration)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_an_encoder_and_its_decoder_hand_on_is_on_disk_too(kind, written, tmp_path):
    folder = encoder_decoder(kind, tmp_path / "model")
    padding = torch.ones_like(IDS)
    padding[::3, 25:] = 0
    padding[20:40, 30:] = 0  # so that the masks of batches differ
    given = {"input_ids": IDS, "attention_mask": padding, "decoder_input_ids": IDS}
    data = [{name: ids[begin : begin + 20] for name, ids in given.items()} for begin in (0, 20, 40)]

    def run(out, limit, stream=True):
        model = loaded(folder) if stream else sparsekern.load(folder, device="cpu")
        sparsekern.prune(model, "sparsegpt", "2:4", data, out=tmp_path / out, progress=False, max_memory=limit)

    run("resident", None, stream=False)
    run("whole", None)
    assert not written
    _, message = lowest(lambda limit: run("limited", limit))
    assert "what blocks hand on of a batch" in message
    assert len(written) > 5  # of batches in front of blocks, and what the decoder's blocks take of the encoder
    expected = tensors_of(tmp_path / "resident")
    assert equal(tensors_of(tmp_path / "whole"), expected) and equal(tensors_of(tmp_path / "limited"), expected)


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


def test_a_corrected_run_counts_the_sums_of_one_stage(tmp_path, monkeypatch):
    needs, counted = {}, memory.room_beside
    monkeypatch.setattr(
        memory,
        "room_beside",
        lambda model, limit, found=None, **more: needs.update(found or {}) or counted(model, limit, found, **more),
    )
    folder = folder_of("llama", tmp_path / "model")
    options = {"batch_size": 4, "progress": False, "correction": "sequential"}
    sparsekern.prune(loaded(folder), "wanda", "2:4", IDS, out=tmp_path / "whole", **options)
    limit = {"max_memory": "8GB"}
    report = sparsekern.prune(loaded(folder), "wanda", "2:4", IDS, out=tmp_path / "out", **options, **limit)
    assert needs[memory.STATISTICS] == 5 * 4 * max(layer.shape[1] for layer in report.layers) ** 2
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


@pytest.mark.parametrize(("leaves", "parts"), [(1, 2), (2, 2), (8, 4)])
def test_partial_sums_are_counted_where_there_are_more_of_them_than_a_gram_matrix_and_its_factor(
    leaves, parts, tmp_path, monkeypatch
):
    needs, counted = {}, memory.room_beside
    monkeypatch.setattr(
        memory,
        "room_beside",
        lambda model, limit, found=None, **more: needs.update(found or {}) or counted(model, limit, found, **more),
    )
    folder = folder_of("llama", tmp_path / "model")
    options = {"out": tmp_path / "out", "batch_size": 4, "progress": False, "max_memory": "8GB", "leaves": leaves}
    report = sparsekern.prune(loaded(folder), "sparsegpt", "2:4", IDS, **options)
    block = {layer.name: layer.shape[1] for layer in report.layers if layer.name.startswith("model.layers.0.")}
    grams = [block[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    assert needs[memory.STATISTICS] == parts * sum(4 * features**2 for features in grams)


def lowest(run):
    """Call `run` with the limit that each refusal asks for, until there is none. Return what it returns, and the last message."""
    limit, message = "1MB", ""
    while True:
        try:
            return run(limit), message
        except ValueError as error:
            asked, message = least_of(error), str(error)
            assert float(asked[:-2]) > float(limit[:-2])
            limit = asked


@pytest.fixture
def written(monkeypatch):
    """The keys of the tensors that shelves have put on disk."""
    found, write = [], Shelf._write
    monkeypatch.setattr(Shelf, "_write", lambda self, key, tensor: found.append(key) or write(self, key, tensor))
    return found


@pytest.mark.parametrize("options", [{}, THEN], ids=["alone", "then wanda"])
def test_a_removal_of_experts_keeps_to_the_limit_before_and_after(options, written, tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model")
    calibration = {"calibration": IDS, "batch_size": 4}
    _, expected = removed(folder, tmp_path / "whole", stream=True, **options, **calibration)
    assert not written

    def run(limit):
        return removed(folder, tmp_path / "out", stream=True, max_memory=limit, **options, **calibration)[1]

    report, message = lowest(run)
    assert "two blocks and a copy of one" in message and ("those of an expert" in message) == bool(options)
    assert len(written) > (100 if options else 20)  # of batches in front of blocks, at both stages
    assert [layer.scores for layer in report.layers] == [layer.scores for layer in expected.layers]
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_a_run_over_several_texts_keeps_to_the_limit(written, tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    texts = {"a": IDS[:32], "b": IDS[32:]}

    def run(place, limit):
        (tmp_path / place).mkdir(exist_ok=True)
        options = {"texts": texts, "batch_size": 4, "out": tmp_path / place / "out", "max_memory": limit}
        return continued(folder, tmp_path / place, stream=True, method="sparsegpt", **options)[1]

    expected = run("whole", None)
    assert not written
    report, message = lowest(lambda limit: run("limited", limit))
    assert "what the state holds of a block" in message or "the hidden states of a window" in message
    assert told(report) == told(expected)
    assert written
    assert equal(tensors_of(tmp_path / "limited" / "out"), tensors_of(tmp_path / "whole" / "out"))


def test_a_checkpoint_in_another_form_than_the_model_needs_a_third_block(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    kept, _ = needs_of(loaded(folder)), folder_of("mixtral", tmp_path / "mixture")
    wider = needs_of(sparsekern.load(folder, device="cpu", stream=True, dtype="float32"))
    assert 3 * kept["two blocks"] == wider["two blocks and a copy of one"]
    assert "two blocks and a copy of one" in needs_of(loaded(tmp_path / "mixture"))
