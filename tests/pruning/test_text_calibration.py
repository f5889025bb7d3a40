"""Calibration by the name of a text: the same as reading it first, and refused where it cannot be read."""

import pytest
import torch

from sparsekern import KPrune, prune, prune_continually
from sparsekern.data import calibration_ids, evaluation_ids, sentence_batches
from tests import encoders, tiny

QUIET = {"progress": False}


@pytest.fixture
def words():
    words = tiny.tokenizer()
    words.add_special_tokens({"pad_token": "<pad>"})
    return words


@pytest.fixture
def texts(tmp_path):
    paths = {}
    for name, step in (("a", 1), ("b", -1)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(" ".join(tiny.TEXT.split()[::step]))
    return paths


def assert_same(model, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_text_prunes_as_its_windows_do(method, texts, words):
    model, expected, other = (tiny.llama(len(words)) for _ in range(3))
    report = prune(model, method, "2:4", str(texts["a"]), tokenizer=words, samples=6, length=24, seed=3, **QUIET)
    ids = calibration_ids(texts["a"], words, samples=6, length=24, seed=3)
    prune(expected, method, "2:4", ids, seed=3, **QUIET)
    assert_same(model, expected)
    assert report.calibration_tokens == 6 * 24
    prune(other, method, "2:4", texts["a"], tokenizer=words, samples=6, length=24, seed=4, **QUIET)
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_default_length_is_that_of_the_model(texts, words):
    report = prune(tiny.llama(len(words)), "wanda", "2:4", texts["a"], tokenizer=words, samples=2, **QUIET)
    assert report.calibration_tokens == 2 * 64


def test_encoders_take_sentences(words):
    def small():
        torch.manual_seed(0)
        import transformers as tf

        return tf.BertModel(tf.BertConfig(**encoders.SIZES | {"vocab_size": len(words)})).eval()

    model, expected, method = small(), small(), KPrune(remove=0.3)
    prune(model, method, None, "builtin:python-docs", tokenizer=words, samples=12, length=16, **QUIET)
    prune(expected, method, None, sentence_batches("builtin:python-docs", words, samples=12, length=16), **QUIET)
    assert_same(model, expected)


def test_several_texts_one_after_another(texts, words):
    model, expected = tiny.llama(len(words)), tiny.llama(len(words))
    options = {"samples": 4, "length": 32, "seed": 1}
    evaluate = {name: str(path) for name, path in texts.items()}
    report = prune_continually(model, texts, "wanda", evaluate=evaluate, tokenizer=words, **options, **QUIET)
    ids = {name: calibration_ids(path, words, **options) for name, path in texts.items()}
    windows = {name: evaluation_ids(path, words, 32) for name, path in texts.items()}
    other = prune_continually(expected, ids, "wanda", evaluate=windows, length=32, seed=1, **QUIET)
    assert_same(model, expected)
    assert report.matrix == other.matrix and report.dense == other.dense


def test_a_text_that_is_not_needed_is_not_read(words, tmp_path):
    (tmp_path / "unreadable.txt").write_bytes(b"\xff\xfe\x00")
    report = prune(tiny.llama(), "magnitude", "2:4", tmp_path / "unreadable.txt", tokenizer=words, **QUIET)
    assert report.sparsity == 0.5


IDS = torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("method", "calibration", "options", "error", "message"),
    [
        (
            "wanda",
            "a.txt",
            {},
            ValueError,
            "tokenizer: expected the model's tokenizer to read calibration='a.txt' with, got None",
        ),
        ("magnitude", "a.txt", {}, ValueError, "tokenizer: expected the model's tokenizer to read calibration='a.txt'"),
        ("wanda", "builtin:python-docs", {"tokenizer": 3}, TypeError, "tokenizer: expected a transformers tokenizer, got int"),
        ("wanda", IDS, {"samples": 4}, ValueError, "samples: expected None unless calibration is a text, got 4"),
        ("wanda", None, {"length": 4}, ValueError, "length: expected None unless calibration is a text, got 4"),
        ("wanda", "builtin:python-docs", {"samples": 0, "tokenizer": len}, ValueError, "samples: expected at least 1, got 0"),
        (
            "wanda",
            "builtin:python-docs",
            {"length": 2.5, "tokenizer": len},
            TypeError,
            "length: expected a whole number of at least 1, got 2.5",
        ),
        (
            "wanda",
            "builtin:python-docs",
            {"length": 65, "tokenizer": len},
            ValueError,
            "length: expected at most 64, the positions of this model",
        ),
        ("wanda", "no such file.txt", {"tokenizer": len}, FileNotFoundError, "text: no file 'no such file.txt'"),
        ("magnitude", "no such file.txt", {"tokenizer": len}, FileNotFoundError, "text: no file 'no such file.txt'"),
        ("magnitude", "builtin:nothing", {"tokenizer": len}, ValueError, "text: expected one of the built-in texts"),
        ("wanda", "builtin:nothing", {"tokenizer": len}, ValueError, "text: expected one of the built-in texts"),
    ],
)
def test_bad_texts_are_refused_before_the_work(method, calibration, options, error, message):
    model, expected = tiny.llama(), tiny.llama()
    with pytest.raises(error, match=message):
        prune(model, method, "2:4", calibration, **options, **QUIET)
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tokenizer: expected the model's tokenizer to read calibration='builtin:python-docs' with, got None"),
        (
            {"calibrations": {"a": IDS}, "samples": 4},
            "samples: expected None unless calibrations holds a text, got 4",
        ),
        (
            {"calibrations": {"a": IDS}, "length": 8},
            "length: expected None unless calibrations or evaluate holds something to cut, got 8",
        ),
        ({"calibrations": {"a": IDS}, "evaluate": {"a": "b.txt"}}, r"evaluate\['a'\]: tokenizer: expected the model's tokenizer"),
    ],
)
def test_several_bad_texts_are_refused_before_the_work(options, message):
    given = {"calibrations": {"a": "builtin:python-docs"}, **options}
    with pytest.raises(ValueError, match=message):
        prune_continually(tiny.llama(), method="wanda", **given, **QUIET)
