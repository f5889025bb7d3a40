"""A tiny random encoder of every make that structured pruning knows."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

from tests.tiny import tokenizer

VOCABULARY = 96
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    num_labels=3,
)
DISTIL = dict(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64, num_labels=3)

MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
    "bert_classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
    "bert_regression": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES | {"num_labels": 1})),
    "bert_masked_lm": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
    "roberta_tokens": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**SIZES)),
    "distilbert": lambda: tf.DistilBertModel(tf.DistilBertConfig(**DISTIL)),
    "distilbert_answers": lambda: tf.DistilBertForQuestionAnswering(tf.DistilBertConfig(**DISTIL | {"num_labels": 2})),
    "minilm": lambda: tf.BertModel(
        tf.BertConfig(**SIZES | {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 96})
    ),
}


def tiny(name: str) -> tf.PreTrainedModel:
    """The same random weights at each call, in evaluation mode; no bias is zero, and no two units are alike in size."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(torch.randn_like(parameter) * 0.05)
    return model


def save_folder(path: Path) -> Path:
    """A classifier with a tokenizer of its own, which pads."""
    words = tokenizer()
    words.pad_token = "<unk>"
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES | {"vocab_size": len(words)})).save_pretrained(path)
    words.save_pretrained(path)
    return path


def padded_ids(lengths: tuple[int, ...] = (9, 4, 12, 7, 12, 5), seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of samples of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def one_by_one(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The samples of a batch each by itself, without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{name: value[i : i + 1, :n] for name, value in batch.items()} for i, n in enumerate(lengths)]


def assert_same_weights(model: tf.PreTrainedModel, expected: tf.PreTrainedModel) -> None:
    """Raise unless the parameters and buffers are equal to the bit.

    Outputs of equal models need not be: where a file is mapped, weights begin at other addresses, and on some CPUs the product that
    torch calls adds in an order that depends on the address.
    """
    found, wanted = model.state_dict(), expected.state_dict()
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
