"""The vocabulary of a GGUF file: a tokenizer of transformers in the terms of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "mask")
SPACE = "\u2581"  # stands for a space in vocabularies of SentencePiece
NONE, BYTES, PIECES = "none", "gpt2", "llama"  # llama.cpp's kinds of tokenizers

# How text is split in front of the merges: the expression of the tokenizer, whether it takes a word that is a token whole -> llama.cpp's name.
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}" + REST.replace("]*|", "/]*|", 1)
SPLITS = {
    (rf"{WORDS}|\p{{N}}{{1,3}}{REST}", True): "llama-bpe",
    (rf"{WORDS}|\p{{N}}{{1,3}}{REST}", False): "smaug-bpe",
    (rf"{WORDS}|\p{{N}}{REST}", False): "qwen2",
    (TEKKEN, True): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the terms of llama.cpp.

    Attributes:
        model: the kind of tokenizer.
        split: the name of the rule by which text is split in front of the merges.
        tokens: the text of each token.
        types: the type of each token.
        merges: pairs of tokens, with a space between them, in the order in which they are merged.
        scores: of each token, the higher the earlier pairs are merged to it; empty where merges are given.
        space_first: whether a space is put in front of a text.
        special: the numbers of the special tokens by name.
        adds: whether the first or last token of a text is a special one, by name.
        chat_template: Jinja templates by name, or one; None if there is none.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_first: bool
    special: dict[str, int]
    adds: dict[str, bool]
    chat_template: str | dict[str, str] | None


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        size: the tokens that the model has embeddings of. Those that the tokenizer lacks are filled up.

    Raises:
        TypeError: it is none of transformers with a backend of the package tokenizers.
        ValueError: it has more tokens, or is of a kind that llama.cpp has not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"tokenizer: expected one of transformers with a tokenizer.json, got {type(tokenizer).__name__}")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(
            f"tokenizer: expected merges of bytes or pieces (BPE), got {model.get('type')} with its prefixes and suffixes"
        )
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    entries = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    entries |= {added["id"]: (added["content"], CONTROL if added["special"] else USER_DEFINED) for added in content["added_tokens"]}
    if entries and max(entries) >= size:
        raise ValueError(f"tokenizer: expected at most {size} tokens, of which the model has embeddings, got {max(entries) + 1}")
    for number, (token, kind) in entries.items():
        tokens[number], types[number] = token, kind
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": {name: found for name in SPECIAL if (found := getattr(tokenizer, f"{name}_token_id", None)) is not None},
        "adds": _added_ends(tokenizer),
        "chat_template": tokenizer.chat_template,
    }
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        of_pieces = [_type_of_piece(token, kind, model.get("unk_token")) for token, kind in zip(tokens, types, strict=True)]
        return Vocabulary(
            PIECES,
            "default",
            types=of_pieces,
            merges=[],
            scores=_scores(tokens, merges),
            space_first=_space_first(content),
            **common,
        )
    split = _split(content, bool(model.get("ignore_merges")))
    joined = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in merges]
    return Vocabulary(BYTES, split, types=types, merges=joined, scores=[], space_first=False, **common)


def add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Add a vocabulary to a `gguf.GGUFWriter`, or that there is none."""
    if vocabulary is None:
        writer.add_tokenizer_model(NONE)
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_first)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name, adds in vocabulary.adds.items():
        getattr(writer, f"add_add_{name}_token")(adds)
    template = vocabulary.chat_template
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)


def _split(content: Mapping[str, Any], takes_words: bool) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer of bytes splits text.

    Raises:
        ValueError: it has no such rule, or the tokenizer changes the text first.
    """
    first = content.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    name = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex") and not takes_words:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and last.get("use_regex") and steps[0].get("individual_digits") and not takes_words:
            name = "smollm"
        elif (
            kinds == ["Split", "ByteLevel"]
            and not last.get("use_regex")
            and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        ):
            name = SPLITS.get((steps[0]["pattern"].get("Regex"), takes_words))
    changes = (content.get("normalizer") or {}).get("type")
    if name is None or changes not in (None, "NFC"):
        raise ValueError(
            "tokenizer: expected one that splits text as GPT-2, SmolLM2, LLaMA 3, Qwen2 or Mistral's Tekken do, or by SentencePiece, got "
            f"{', '.join(map(str, kinds))} behind normalizer {changes}; without tokenizer the file runs on token ids"
        )
    return name


def _space_first(content: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer of pieces puts a space in front of a text.

    Raises:
        ValueError: it treats spaces as no tokenizer of llama.cpp does.
    """
    changes, splits = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = changes.get("normalizers", [changes] if changes else [])
    kinds = [step["type"] for step in steps]
    if splits.get("type") == "Metaspace" and not kinds and splits["replacement"] == SPACE and not splits.get("split"):
        return bool(splits["prepend_scheme"] != "never")
    if not splits and kinds in (["Prepend", "Replace"], ["Replace"]):
        replaced = steps[-1]
        if replaced["pattern"] == {"String": " "} and replaced["content"] == SPACE and steps[0].get("prepend", SPACE) == SPACE:
            return kinds[0] == "Prepend"
    raise ValueError(
        f"tokenizer: expected one of SentencePiece that writes spaces as {SPACE} and does not split there, got normalizer "
        f"{', '.join(kinds) or None} and pre-tokenizer {splits.get('type')}"
    )


def _type_of_piece(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if kind == NORMAL and is_byte else kind


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score for each token: minus the place of the first merge that makes it; below all others where none does."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    return [-float(places.get(token, len(merges))) for token in tokens]


def _added_ends(tokenizer: Any) -> dict[str, bool]:
    """Return whether a tokenizer begins a text with its first token, and ends it with its last.

    Raises:
        ValueError: it adds other tokens.
    """
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for first in (False, True):
        for last in (False, True):
            if whole == [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last:
                return {"bos": first, "eos": last}
    raise ValueError(
        f"tokenizer: expected no tokens around a text but its first and its last, got {tokenizer.convert_ids_to_tokens(whole)}"
    )
