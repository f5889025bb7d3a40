"""Sentences for encoders: what counts as one, how they are drawn and how they are batched."""

import pytest
import torch

from sparsekern.data import sentence_batches, split_sentences
from tests import tiny


@pytest.fixture
def words():
    words = tiny.tokenizer()
    words.add_special_tokens({"pad_token": "<pad>"})
    return words


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Sentence {'very ' * n}long is this one. And the other one is short." for n in range(40)))
    return path


def test_sentences():
    document = (
        "A heading\n\nThe first sentence\ngoes over two lines. (The second is in brackets.) x = f(1); y = 2.\n\n    code = here()"
    )
    assert split_sentences([document, document, "He said so, i.e. nothing new at all!"]) == [
        "The first sentence goes over two lines.",
        "(The second is in brackets.) x = f(1); y = 2.",
        "He said so, i.e. nothing new at all!",
    ]


def test_batches_hold_each_sentence_once_padded_to_their_own_longest(text, words):
    batches = sentence_batches(text, words, samples=1000, length=100)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert len(batches) > 1 and len(lengths.unique()) > 10
    assert len(lengths) == 41 and lengths.max() == 100 and torch.equal(lengths, lengths.sort().values)
    for batch in batches:
        mask = batch["attention_mask"].bool()
        assert mask.any(0).all() and (batch["input_ids"][~mask] == words.pad_token_id).all() and mask.numel() <= 2048
    rows = {
        tuple(ids[keep].tolist()) for b in batches for ids, keep in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)
    }
    assert tuple(words("And the other one is short.")["input_ids"]) in rows


def test_the_draw_hangs_on_the_seed_only(text, words):
    drawn = [torch.cat([b["attention_mask"].sum(1) for b in sentence_batches(text, words, samples=9, seed=s)]) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and len(drawn[0]) == 9


@pytest.mark.parametrize("settings", [{"samples": 0}, {"length": 0}])
def test_bad_numbers(text, words, settings):
    with pytest.raises(ValueError, match="(samples|length): expected at least 1, got 0"):
        sentence_batches(text, words, **settings)


def test_a_source_without_sentences(tmp_path, words):
    (tmp_path / "code.txt").write_text("x = 1\n\ny = 2")
    with pytest.raises(ValueError, match="calibration: .*code.txt holds no sentence of at least 4 words"):
        sentence_batches(tmp_path / "code.txt", words)


def test_a_tokenizer_without_padding_is_refused(text):
    with pytest.raises(ValueError, match="tokenizer: expected one with a padding token"):
        sentence_batches(text, tiny.tokenizer())


def test_a_sentence_is_longer_than_its_special_tokens(text, words):
    from tokenizers.processors import TemplateProcessing

    known = [("<pad>", words.pad_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A <pad>", special_tokens=known)
    with pytest.raises(ValueError, match="length: expected more than the 2 special tokens of each sentence, got 2"):
        sentence_batches(text, words, length=2)
    assert max(batch["input_ids"].shape[1] for batch in sentence_batches(text, words, length=3)) == 3
