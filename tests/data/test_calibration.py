import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern
from sparsekern.data import (
    as_calibration,
    calibration_ids,
    describe_calibration,
    encode,
    evaluation_ids,
    is_source,
    sample_windows,
    sentence_batches,
)
from sparsekern.data import calibration as reading
from tests import encoders, tiny


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 60), st.integers(0, 3))
def test_windows_are_cut_out_of_the_text_in_its_order(tokens, samples, length, seed):
    text = torch.arange(max(tokens, length))
    windows = sample_windows(text, samples, length, seed)
    assert windows.shape == (samples, length)
    starts = windows[:, 0]
    assert (windows - starts[:, None] == torch.arange(length)).all()
    assert (starts.diff() >= 0).all() and starts.min() >= 0 and windows.max() < len(text)


def test_windows_cover_the_text_evenly():
    windows = sample_windows(torch.arange(1000), 10, 100)
    assert len(windows.unique()) > 700  # places chosen freely would leave a third of the text out
    assert (windows[:, 0] // 90 - torch.arange(10)).abs().max() <= 1


def test_any_window_of_the_text_may_be_drawn():
    starts = {int(sample_windows(torch.arange(8), 1, 6, seed)[0, 0]) for seed in range(40)}
    assert starts == {0, 1, 2}


def test_the_seed_decides(words, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(tiny.TEXT)
    first, again = (calibration_ids(source, words, samples=4, length=16, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, calibration_ids(source, words, samples=4, length=16, seed=2))


def test_text_of_exactly_one_window(words, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the quick brown fox")
    tokens = encode(["the quick brown fox"], words)
    assert torch.equal(calibration_ids(source, words, samples=3, length=len(tokens)), tokens.expand(3, -1))


def test_too_little_text_says_how_much_there_is(words, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the quick brown fox")
    held = len(encode(["the quick brown fox"], words))
    with pytest.raises(ValueError, match=rf"a.txt has {held} tokens; one window of length 2048 needs 2048"):
        calibration_ids(source, words)


def test_windows_need_one_window_of_tokens():
    with pytest.raises(ValueError, match="tokens: expected at least 8 for one window, got 7"):
        sample_windows(torch.arange(7), 1, 8)


@pytest.mark.parametrize("name", ["samples", "length"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_counts_are_positive(words, name, value, error):
    with pytest.raises(error, match=f"{name}: expected .*at least 1, got {value!r}"):
        calibration_ids("builtin:python-docs", words, **{name: value})


def test_of_a_large_source_only_some_documents_are_read(tmp_path):
    read = []

    def count(text, **_):
        read.append(len(text))
        return {"input_ids": list(range(len(text)))}

    source = tmp_path / "a.jsonl"
    source.write_text("\n".join('{"text": "%s"}' % (str(i) * 100) for i in range(1000)))
    calibration_ids(source, count, samples=4, length=32)
    assert 4 * 32 * 16 <= max(read) < 4 * 32 * 16 + 500


def test_documents_are_joined_by_a_blank_line(words):
    assert torch.equal(encode(["a b", "c"], words), encode(["a b\n\nc"], words))


def wrapping(single: str):
    """The tiny tokenizer with special tokens around a text, by a template such as `<bos> $A`."""
    from tokenizers.processors import TemplateProcessing

    words = tiny.tokenizer()
    words.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    known = [(token, words.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    words.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    return words


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(tiny.TEXT)
    return path


@pytest.mark.parametrize(
    ("single", "prefix"),
    [("<bos> $A", ["<bos>"]), ("<bos> <eos> $A", ["<bos>", "<eos>"]), ("<bos> $A <eos>", ["<bos>"]), ("$A <eos>", []), ("$A", [])],
)
def test_each_window_begins_as_a_text_does(text, single, prefix):
    words = wrapping(single)
    first = words.convert_tokens_to_ids(prefix)
    plain = encode([tiny.TEXT], words)
    assert not torch.isin(plain, torch.tensor(words.convert_tokens_to_ids(["<bos>", "<eos>"]))).any()
    drawn, evaluated = calibration_ids(text, words, samples=5, length=16), evaluation_ids(text, words, 16)
    assert drawn.shape == (5, 16) and evaluated.shape == (len(plain) // (16 - len(first)), 16)
    for windows in (drawn, evaluated):
        assert windows[:, : len(first)].tolist() == [first] * len(windows)
        assert windows.dtype == torch.int64 and windows[:, len(first) :].max() < len(tiny.tokenizer())
    inner = evaluated[:, len(first) :].flatten()
    assert torch.equal(inner, plain[: len(inner)])
    assert torch.equal(drawn[:, len(first) :], sample_windows(plain, 5, 16 - len(first)))


def test_text_of_exactly_one_window_with_special_tokens(text):
    words = wrapping("<bos> $A")
    tokens = len(encode([tiny.TEXT], words))
    assert calibration_ids(text, words, samples=1, length=tokens + 1).tolist() == [words(tiny.TEXT)["input_ids"]]
    for make in (calibration_ids, evaluation_ids):
        with pytest.raises(
            ValueError, match=f"has {tokens} tokens; one window of length {tokens + 2} needs {tokens + 1} and 1 special"
        ):
            make(text, words, length=tokens + 2)


def test_a_window_is_longer_than_the_special_tokens(text):
    words = wrapping("<bos> <eos> $A")
    for make in (calibration_ids, evaluation_ids):
        with pytest.raises(ValueError, match="length: expected more than the 2 special tokens that begin each window, got 2"):
            make(text, words, length=2)


def test_a_text_that_begins_like_its_special_tokens(tmp_path):
    words = wrapping("<bos> $A")
    (tmp_path / "a.txt").write_text("<bos><bos>the quick brown fox jumps over the lazy dog")
    bos = words.bos_token_id
    assert evaluation_ids(tmp_path / "a.txt", words, 6)[0, :4].tolist()[:3] == [bos, bos, bos]


def test_perplexity_of_a_text_counts_from_the_special_tokens(text):
    words = wrapping("<bos> $A")
    model = tiny.llama(len(words))
    windows = evaluation_ids(text, words, 24)
    assert sparsekern.perplexity(model, text, 24, tokenizer=words) == sparsekern.perplexity(model, windows, 24)
    assert sparsekern.perplexity(model, str(text), tokenizer=words) == sparsekern.perplexity(model, evaluation_ids(text, words, 64))
    with pytest.raises(ValueError, match=r"tokenizer: expected the model's tokenizer to read ids='.*a.txt' with, got None"):
        sparsekern.perplexity(model, text)


def test_evaluation_takes_the_held_out_part_from_its_beginning(words):
    all_windows = evaluation_ids("builtin:python-docs", words, 64)
    assert torch.equal(evaluation_ids("builtin:python-docs", words, 64, windows=3), all_windows[:3])
    assert not torch.equal(evaluation_ids("builtin:python-docs", words, 64, windows=3, part="calibration"), all_windows[:3])
    with pytest.raises(ValueError, match="windows: expected at least 1, got 0"):
        evaluation_ids("builtin:python-docs", words, 64, windows=0)


def test_a_text_becomes_calibration(text):
    words, model = wrapping("<bos> $A"), tiny.llama()
    assert is_source(text) and is_source("hf:wikitext") and not is_source(torch.zeros(1)) and not is_source(None)
    given = as_calibration(text, tokenizer=words, samples=3, length=16, seed=2).read(model)
    assert torch.equal(given, calibration_ids(text, words, samples=3, length=16, seed=2))
    assert describe_calibration(given) == "3 x 16 tokens"
    assert as_calibration(str(text), tokenizer=words).read(model).shape == (128, 64)  # the model's positions


@pytest.mark.parametrize("sentences", [False, True])
def test_a_text_is_read_once(sentences, text, monkeypatch):
    """Whoever describes it first, as the command does, reads it for all."""
    calls = []
    for name in ("calibration_ids", "sentence_batches"):
        monkeypatch.setattr(reading, name, lambda *_, **options: calls.append(options) or object())
    given, model = as_calibration(text, tokenizer=wrapping("<bos> $A"), sentences=sentences), tiny.llama()
    assert given.read(model) is given.read(model) and len(calls) == 1
    dataclasses.replace(given, samples=7).read(model)  # another text
    given.read(tiny.llama(max_position_embeddings=32))
    assert [options["samples"] == 7 for options in calls] == [False, True, False] and calls[2]["length"] == 32


def test_a_text_becomes_sentences():
    words, model = wrapping("<bos> $A <eos>"), encoders.tiny("bert")
    given = as_calibration("builtin:python-docs", tokenizer=words, samples=9, seed=3, sentences=True).read(model)
    expected = sentence_batches("builtin:python-docs", words, samples=9, length=64, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(given, expected, strict=True))
    assert describe_calibration(given) == "9 sentences"
    whole = as_calibration("builtin:python-docs", tokenizer=words, length=8, sentences=True).read(model)
    assert describe_calibration(whole) == "1024 sentences"


def test_the_default_samples_and_length(monkeypatch, words):
    from sparsekern.data import calibration

    asked = []
    monkeypatch.setattr(calibration, "calibration_ids", lambda source, tokenizer, **options: asked.append(options))
    as_calibration("builtin:python-docs", tokenizer=words).read(tiny.llama(max_position_embeddings=4096))
    as_calibration("builtin:python-docs", tokenizer=words, seed=7).read(torch.nn.Linear(1, 1))
    assert asked == [{"samples": 128, "length": 2048, "seed": 0}, {"samples": 128, "length": 2048, "seed": 7}]


@pytest.mark.parametrize("given", [None, torch.zeros(1, 4, dtype=torch.int64), [torch.zeros(1, 4, dtype=torch.int64)]])
def test_what_is_no_text_stays_as_it_is(given):
    assert as_calibration(given) is given
    for option in ("samples", "length"):
        with pytest.raises(ValueError, match=f"{option}: expected None unless calibration is a text, got 4"):
            as_calibration(given, **{option: 4})


def test_a_text_needs_a_tokenizer(text, words):
    message = "tokenizer: expected the model's tokenizer to read calibration='hf:wikitext' with, got None"
    with pytest.raises(ValueError, match=message):
        as_calibration("hf:wikitext")
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer, got int"):
        as_calibration(text, tokenizer=3)
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        as_calibration(text, tokenizer=words, samples=0)


@pytest.mark.parametrize("sentences", [False, True])
def test_a_window_fits_the_model(text, words, sentences):
    with pytest.raises(ValueError, match="length: expected at most 64, the positions of this model, got 65"):
        as_calibration(text, tokenizer=words, length=65, sentences=sentences).read(tiny.llama())
