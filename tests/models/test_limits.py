"""The limits of a model's input: positions, the length of a window and the vocabulary."""

import pytest
import torch
from torch import nn

from sparsekern.models.limits import check_token_ids, positions, vocabulary, window_length
from tests import encoders, tiny
from tests.models.zoo import ZOO


@pytest.mark.parametrize(("name", "expected"), [("bert", 64), ("distilbert", 64), ("roberta_tokens", 63)])
def test_a_sample_of_that_many_positions_runs(name, expected):
    model = encoders.tiny(name)
    assert positions(model) == expected
    model(torch.full((1, expected), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, expected + 1), 5))


def test_positions_behind_a_padding_index():
    import transformers as tf

    model = tf.RobertaModel(tf.RobertaConfig(**encoders.SIZES | {"pad_token_id": 1}))
    assert positions(model) == 62
    model(torch.full((1, 62), 5))


@pytest.mark.parametrize("limit", [None, -1, 0, True, "64"])
def test_a_config_without_a_limit(limit):
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"max_position_embeddings": limit})()
    assert positions(model) is None and positions(nn.Linear(1, 1)) is None
    assert window_length(model) == 2048 and window_length(model, 10_000) == 10_000


def test_the_default_length_is_the_paper_s_or_what_fits():
    assert window_length(tiny.llama(max_position_embeddings=4096)) == 2048
    assert window_length(tiny.llama()) == 64 and window_length(tiny.llama(), 64) == 64
    assert window_length(encoders.tiny("roberta_tokens")) == 63


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (65, ValueError, "length: expected at most 64, the positions of this model, got 65"),
        (0, ValueError, "length: expected at least 1, got 0"),
        (1.5, TypeError, "length: expected a whole number of at least 1, got 1.5"),
        (True, TypeError, "length: expected a whole number of at least 1, got True"),
    ],
)
def test_a_length_that_does_not_fit(length, error, message):
    with pytest.raises(error, match=message):
        window_length(tiny.llama(), length)


@pytest.mark.parametrize("family", ["clip", "wav2vec2", "vit"])
def test_models_that_do_not_say_which_ids_they_know(family):
    """transformers raises for the input embeddings of some, and of others gives a module without a vocabulary."""
    assert vocabulary(ZOO[family].model()) is None


def test_token_ids_are_those_of_the_model():
    assert vocabulary(tiny.llama(17)) == 17 and vocabulary(nn.Linear(1, 1)) is None
    check_token_ids("ids", torch.tensor([0, 16]), 17)
    check_token_ids("ids", torch.zeros(0, dtype=torch.int64), 17)
    check_token_ids("ids", torch.tensor([10**6]), None)
    with pytest.raises(ValueError, match="ids: expected token ids from 0 to 16, got 17; is this the model's own tokenizer"):
        check_token_ids("ids", torch.tensor([3, 17]), 17)
    with pytest.raises(ValueError, match="ids: expected token ids from 0 to 16, got -1"):
        check_token_ids("ids", torch.tensor([3, -1]), 17)
    with pytest.raises(ValueError, match="ids: expected token ids of at least 0, got -1"):
        check_token_ids("ids", torch.tensor([-1]), None)
