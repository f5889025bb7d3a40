"""Tokenizers in the terms of llama.cpp, as transformers reads them back."""

from __future__ import annotations

import json

import pytest
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

import sparsekern
from sparsekern.export.vocabulary import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of
from tests import tiny

pytest.importorskip("gguf", reason="the extra sparsekern[gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra sparsekern[gguf] is not installed")

TEXTS = (tiny.TEXT[:80], "  Two spaces, 1234 567 numbers;\n\n\tlines\r\n don't WE'LL über 我想 <think> end", "")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def of_bytes(split: str, takes_words: bool = False, changes=None) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of bytes that splits text by a rule."""
    backend = Tokenizer(models.BPE(ignore_merges=takes_words))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = (
        whole
        if split == "gpt-2"
        else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
        if split == "smollm"
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), of_parts])
    )
    backend.normalizer, backend.decoder = changes, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [*TEXTS, tiny.TEXT], trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def of_pieces(prefix: bool = True) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of pieces, as LLaMA 2 has it."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([tiny.TEXT], trainers.BpeTrainer(vocab_size=80))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocab, {token: -float(number) for token, number in vocab.items()})
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **SPECIAL)


def read_back(tokenizer, path):
    model = tiny.llama(vocabulary=340, hidden_size=64)
    path = sparsekern.export_gguf(model, path, tokenizer=tokenizer)
    return tf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


RULES = {"gpt-2": "gpt-2", "smollm": "smollm"} | {name: rule for rule, name in SPLITS.items()}


@pytest.mark.parametrize("name", RULES)
def test_tokenizers_of_bytes(name, tmp_path):
    split, takes_words = (name, False) if isinstance(RULES[name], str) else RULES[name]
    tokenizer = of_bytes(split, takes_words, normalizers.NFC() if name == "qwen2" else None)
    tokenizer.chat_template = "{{ messages }}"
    found = vocabulary_of(tokenizer, 340)
    assert (found.model, found.split, found.space_first) == ("gpt2", name, False) and len(found.tokens) == len(found.types) == 340
    assert found.types[:3] == [CONTROL, CONTROL, NORMAL] and found.types[len(tokenizer) - 1 :] == [USER_DEFINED] + [UNUSED] * (
        340 - len(tokenizer)
    )
    again = read_back(tokenizer, tmp_path / "a.gguf")
    if name != "smollm":  # whose digits transformers does not read from GGUF
        for text in TEXTS:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert (again.bos_token, again.eos_token, again.chat_template) == ("<s>", "</s>", "{{ messages }}")


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_of_pieces(tmp_path, prefix):
    tokenizer = of_pieces(prefix)
    found = vocabulary_of(tokenizer, 340)
    assert (found.model, found.space_first, found.adds) == ("llama", prefix, {"bos": True, "eos": False})
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and found.types[259] == NORMAL
    made = [token for token, score in zip(found.tokens, found.scores, strict=True) if score > min(found.scores)]
    assert made and sorted(made, key=found.tokens.index) == sorted(made, key=lambda t: -found.scores[found.tokens.index(t)])
    if prefix:  # transformers always puts one in front
        again = read_back(tokenizer, tmp_path / "a.gguf")
        for text in TEXTS[:1]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_spaces_by_a_normalizer_are_the_same():
    tokenizer = of_pieces()
    replace = normalizers.Replace(" ", "\u2581")
    for steps, first in (([normalizers.Prepend("\u2581"), replace], True), ([replace], False)):
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        assert vocabulary_of(tokenizer, 340).space_first == first


def test_spaces_in_merges_are_written_as_bytes_are():
    content = json.loads(of_bytes("gpt-2").backend_tokenizer.to_str())
    content["model"]["merges"].append(["a b", "c"])
    content["model"]["vocab"] |= {"a b": 331, "a bc": 332}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    assert vocabulary_of(tokenizer, 340).merges[-1] == "a\u0120b c"


def test_what_is_refused():
    tokenizer = of_bytes("gpt-2")
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers with a tokenizer.json, got str"):
        vocabulary_of("tokenizer", 340)
    with pytest.raises(ValueError, match=f"tokenizer: expected at most 300 tokens, .* got {len(tokenizer)}"):
        vocabulary_of(tokenizer, 300)
    for other in (of_bytes(r"\s+"), of_bytes("gpt-2", changes=normalizers.Lowercase()), of_bytes("smollm", takes_words=True)):
        with pytest.raises(ValueError, match="tokenizer: expected one that splits text as GPT-2, SmolLM2, .* runs on token ids"):
            vocabulary_of(other, 340)
    pieces = of_pieces()
    pieces.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    with pytest.raises(
        ValueError, match="tokenizer: expected one of SentencePiece that writes spaces as .* pre-tokenizer Metaspace"
    ):
        vocabulary_of(pieces, 340)
    words = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"tokenizer: expected merges of bytes or pieces \(BPE\), got WordLevel"):
        vocabulary_of(words, 340)
    around = of_bytes("gpt-2")
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <think>", special_tokens=[("<think>", len(around) - 1)]
    )
    with pytest.raises(ValueError, match="tokenizer: expected no tokens around a text but its first and its last, got"):
        vocabulary_of(around, 340)
