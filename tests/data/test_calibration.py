import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.data import calibration_ids, encode, sample_windows
from tests import tiny


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
def test_counts_are_positive(words, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        calibration_ids("builtin:python-docs", words, **{name: 0})


def test_of_a_large_source_only_some_documents_are_read(tmp_path):
    read = []

    def count(text, **_):
        read.append(len(text))
        return {"input_ids": list(range(len(text)))}

    source = tmp_path / "a.jsonl"
    source.write_text("\n".join('{"text": "%s"}' % (str(i) * 100) for i in range(1000)))
    calibration_ids(source, count, samples=4, length=32)
    assert 4 * 32 * 16 <= read[0] < 4 * 32 * 16 + 500


def test_documents_are_joined_by_a_blank_line(words):
    assert torch.equal(encode(["a b", "c"], words), encode(["a b\n\nc"], words))
