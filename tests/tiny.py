"""A tiny random LLaMA with a tokenizer of its own, saved as a folder: what a person would hand to the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

POSITIONS = 64
TEXT = "the quick brown fox jumps over the lazy dog and runs far away from every other animal of the wood " * 40


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def llama(vocabulary: int = 320, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def save_folder(path: Path, **changes) -> Path:
    words = tokenizer()
    llama(len(words), **changes).save_pretrained(path)
    words.save_pretrained(path)
    return path


def save_mixture(path: Path, experts: int = 8) -> Path:
    """Save a tiny random Mixtral of the same shape, with the tokenizer."""
    words = tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(**llama(len(words)).config.to_diff_dict(), num_local_experts=experts)
    MixtralForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return path
