"""`self:200k`: calibration windows that the model writes itself."""

import pytest
import torch

import sparsekern
from sparsekern.data import CalibrationText, own_samples, perplexity, read_documents
from sparsekern.data.own_samples import continued, own_windows
from sparsekern.data.sources import check_source, own_tokens
from tests import encoders, tiny
from tests.models.families import tiny_ids

LENGTH = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(seed=0, source="self:480", samples=None, **changes):
    return own_windows(tiny.llama(**changes), source, samples=samples, length=LENGTH, seed=seed)


def test_windows_are_the_models_own():
    """Their first continuations are the most likely ones, computed without a cache of keys and values; no special token is drawn."""
    model = tiny.llama(eos_token_id=7, bos_token_id=5)
    ids = own_windows(model, "self:480", samples=None, length=LENGTH, seed=0)
    assert ids.shape == (40, LENGTH) and ids.dtype == torch.int64
    assert not torch.isin(ids, torch.tensor([5, 7])).any()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    logits[..., [5, 7]] = -torch.inf
    assert torch.equal(ids[:, 1:5], logits[:, :4].argmax(-1))
    assert not torch.equal(ids[:, 5:], logits[:, 4:-1].argmax(-1))


def test_equal_arguments_write_equal_windows(cache, monkeypatch):
    first = written()
    (file,) = cache.iterdir()
    monkeypatch.setattr(own_samples, "_written", None)  # a second writing would call it
    assert torch.equal(written(), first)
    monkeypatch.undo()
    monkeypatch.setenv("SPARSEKERN_CACHE", str(cache))
    file.write_bytes(b"damaged")
    assert torch.equal(written(), first)


def test_the_seed_and_the_model_change_the_windows(cache):
    first = written()
    assert not torch.equal(written(seed=1), first) and not torch.equal(written(hidden_size=16), first)
    assert len(list(cache.iterdir())) == 3
    assert torch.equal(written(samples=32), first[:32])  # the first batch of them


def test_a_model_goes_on_with_passages(cache, monkeypatch):
    """Where it is sure of the next token, it writes that one, computed without a cache of keys and values; no special token is drawn."""
    model, passages = tiny.llama(eos_token_id=7, bos_token_id=5), tiny_ids(40, 3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    ids = continued(model, passages, length=LENGTH, seed=0)
    assert ids.shape == (40, LENGTH) and torch.equal(ids[:, :3], passages)
    assert not torch.isin(ids[:, 3:], torch.tensor([5, 7])).any()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    logits[..., [5, 7]] = -torch.inf
    chosen = logits[:, 2:-1].gather(2, ids[:, 3:, None])
    assert (logits[:, 2:-1].amax(2, keepdim=True) - chosen).max() < 20  # others are hundreds below
    assert not torch.equal(continued(model, passages.flip(0), length=LENGTH, seed=0), ids)
    monkeypatch.setattr(own_samples, "_written", None)  # a second writing would call it
    assert torch.equal(continued(model, passages, length=LENGTH, seed=0), ids)


def test_passages_are_read_alike_where_the_model_returns_all_logits(monkeypatch):
    model, passages = tiny.llama(), tiny_ids(4, 3)
    whole = [*own_samples._written(model, passages, LENGTH, 0, False)]
    forward = type(model).forward

    def without_choice(self, input_ids=None, past_key_values=None, use_cache=None):
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", without_choice)
    assert torch.equal(torch.cat(whole), torch.cat([*own_samples._written(model, passages, LENGTH, 0, False)]))


def test_writing_shows_a_bar_where_it_is_asked_for(capsys):
    for progress in (False, True):
        own_windows(tiny.llama(), f"self:{480 + progress * LENGTH}", samples=None, length=LENGTH, seed=0, progress=progress)
        assert ("writing" in capsys.readouterr().err) == progress


def test_prune_calibrates_on_them():
    options = {"samples": 4, "length": LENGTH, "progress": False}
    model, same = tiny.llama(), tiny.llama()
    report = sparsekern.prune(model, "wanda", "2:4", "self:480", **options)
    assert report.calibration_tokens == 4 * LENGTH
    sparsekern.prune(same, "wanda", "2:4", written(samples=4), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(("source", "tokens"), [("self:1", 1), ("self:200k", 200_000), ("self:2M", 2_000_000)])
def test_amounts(source, tokens):
    assert own_tokens(source) == tokens
    check_source(source)


@pytest.mark.parametrize("source", ["self:", "self:0", "self:-1", "self:2.5k", "self:2G"])
def test_bad_amounts_are_refused_before_anything_is_read(source):
    with pytest.raises(ValueError, match="calibration: expected a number of tokens such as 'self:200k'"):
        CalibrationText(source, None)


def test_refusals():
    with pytest.raises(ValueError, match="calibration: self:11 makes 0 windows of 12 tokens, expected 1 or more of them"):
        written(source="self:11")
    with pytest.raises(ValueError, match="calibration: self:480 makes 40 windows of 12 tokens, expected 41 or more of them"):
        written(samples=41)
    with pytest.raises(ValueError, match="is for calibration alone, since a model writes it"):
        read_documents("self:480")
    with pytest.raises(ValueError, match="is for calibration alone, since a model writes it"):
        perplexity(tiny.llama(), "self:480", length=LENGTH, tokenizer=tiny.tokenizer())
    encoder = encoders.tiny("bert_classifier")
    with pytest.raises(ValueError, match="calibration: expected a text for .*, which predicts no next tokens to write its own"):
        own_windows(encoder, "self:480", samples=None, length=LENGTH, seed=0)
