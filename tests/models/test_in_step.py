"""Forwards that go through a streamed model together."""

import threading

import pytest
import torch

import sparsekern
from sparsekern.models.in_step import in_step
from sparsekern.models.streaming import stream_of
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_streaming import folder_of


@pytest.fixture
def streamed(tmp_path):
    return sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)


def counted(model, monkeypatch):
    stream, read = stream_of(model), []
    load = stream._load
    monkeypatch.setattr(stream, "_load", lambda names: read.append(stream.names.index(names)) or load(names))
    return read


def test_perplexity_reads_each_block_once(streamed, tmp_path, monkeypatch):
    read = counted(streamed, monkeypatch)
    ids = tiny_ids(6, 16)
    value = sparsekern.perplexity(streamed, ids, length=8)
    assert sorted(read) == [0, 1, 2]
    assert value == sparsekern.perplexity(sparsekern.load(tmp_path / "model", device="cpu"), ids, length=8)


@torch.no_grad()
def test_forwards_that_skip_blocks_wait_for_the_others(streamed, monkeypatch):
    read, inner = counted(streamed, monkeypatch), streamed.model

    def through(*blocks):
        @torch.no_grad()
        def run():
            x = inner.embed_tokens(tiny_ids(1, 6))
            positions = inner.rotary_emb(x, torch.arange(6)[None])
            for block in blocks:
                x = inner.layers[block](x, position_embeddings=positions)
            return x

        return run

    found = list(in_step(streamed, [through(2), through(0, 1, 2), through(1, 2)]))
    assert len(found) == 3 and sorted(read) == [0, 1, 2]


def test_results_come_in_the_order_of_the_calls(streamed):
    ids = tiny_ids(4, 6)
    with torch.no_grad():
        expected = [streamed(row[None]).logits for row in ids]

    def call(row):
        def run():
            with torch.no_grad():
                return streamed(row[None]).logits

        return run

    found = list(in_step(streamed, [call(row) for row in ids]))
    assert len(found) == 4 and all(map(torch.equal, found, expected))


def test_an_error_in_one_forward_is_raised_and_ends_the_others(streamed):
    threads = threading.active_count()
    bad = torch.full((1, 4), 10_000)
    calls = [lambda: streamed(tiny_ids(1, 4)), lambda: streamed(bad), lambda: streamed(tiny_ids(1, 4))]
    with pytest.raises(IndexError):
        list(in_step(streamed, calls))
    assert threading.active_count() == threads
    assert stream_of(streamed)._wait is None and not any(stream_of(streamed)._holders)


def test_a_model_in_memory_runs_one_call_after_another():
    model = tiny_model("llama")
    assert list(in_step(model, [lambda: 1, threading.current_thread])) == [1, threading.current_thread()]
