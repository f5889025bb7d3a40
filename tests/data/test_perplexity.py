import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import sparsekern
from sparsekern.data import predictions
from tests import encoders, tiny
from tests.models.families import FAMILIES, VOCABULARY


def textbook(model, ids, length):
    losses = []
    for row in torch.atleast_2d(ids):
        for start in range(0, len(row) - length + 1, length):
            window = row[None, start : start + length]
            with torch.no_grad():
                logits = model(window).logits[0, :-1].double()
            losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_textbook(rows):
    model, ids = tiny.llama(), torch.randint(320, (rows, 100))
    assert sparsekern.perplexity(model, ids, 24) == pytest.approx(textbook(model, ids, 24), rel=1e-5)
    assert sparsekern.perplexity(model, ids[0], 24) == pytest.approx(textbook(model, ids[0], 24), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_whatever_it_does_to_its_logits(family):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    ids = torch.randint(3, VOCABULARY, (50,))
    assert sparsekern.perplexity(model, ids, 20) == pytest.approx(textbook(model, ids, 20), rel=1e-5)


def test_a_model_that_caps_its_logits_takes_the_whole_path():
    from transformers import AutoModelForCausalLM

    config = FAMILIES["gemma2"]()
    config.final_logit_softcapping = 0.01
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, VOCABULARY, (40,))
    assert sparsekern.perplexity(model, ids, 20) == pytest.approx(textbook(model, ids, 20), rel=1e-5)


def test_the_logits_of_a_window_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(predictions, "LOGIT_ROWS", 8)
    model, ids = tiny.llama(), torch.randint(320, (60,))
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, output: rows.append(output.numel() // output.shape[-1]))
    value = sparsekern.perplexity(model, ids, 60)
    assert max(rows) == 8 and sum(rows) == 60  # 59 predictions, and the one position that the model itself asked for
    assert value == pytest.approx(textbook(model, ids, 60), rel=1e-5)


def test_the_model_is_as_it_was():
    model = tiny.llama().train()
    sparsekern.perplexity(model, torch.randint(320, (40,)), 20)
    assert model.training and not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_own_mode(training):
    model = tiny.llama().train(training)
    model.model.layers[0].train(not training)
    modes = [part.training for part in model.modules()]
    sparsekern.perplexity(model, torch.randint(320, (64,)), 16)
    assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2


def test_half_precision():
    model, ids = tiny.llama().bfloat16(), torch.randint(320, (64,))
    assert sparsekern.perplexity(model, ids, 32) == pytest.approx(textbook(model, ids, 32), rel=2e-2)


def test_a_hopeless_model_is_infinitely_perplexed():
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert sparsekern.perplexity(model, torch.randint(320, (40,)), 20) == math.inf


def test_nan_is_named():
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    ids = torch.zeros(60, dtype=torch.int64)
    ids[45] = 7
    with pytest.raises(ValueError, match="perplexity: the model's output for window 2 holds NaN or Inf"):
        sparsekern.perplexity(model, ids, 20)


@pytest.mark.parametrize(
    "ids, length, error, message",
    [
        (torch.zeros(19, dtype=torch.int64), 20, ValueError, "ids: one window of length 20 needs 20 tokens, got 19"),
        (torch.zeros(0, 20, dtype=torch.int64), 20, ValueError, "ids: one window of length 20 needs 20 tokens, got 0 rows of 20"),
        (torch.zeros(5, 19, dtype=torch.int64), 20, ValueError, "ids: one window of length 20 needs 20 tokens, got 5 rows of 19"),
        (torch.zeros(99, dtype=torch.int64), 1, ValueError, "length: expected at least 2, got 1"),
        (torch.zeros(99, dtype=torch.int64), 65, ValueError, "length: expected at most 64, the positions of this model, got 65"),
        (
            torch.full((99,), 320),
            20,
            ValueError,
            "ids: expected token ids from 0 to 319, got 320; is this the model's own tokenizer",
        ),
        (torch.full((99,), -1), 20, ValueError, "ids: expected token ids from 0 to 319, got -1"),
        (torch.zeros(99), 20, TypeError, r"ids: expected an integer tensor .*, got float32 \[99\]"),
        (torch.zeros(99, dtype=torch.bool), 20, TypeError, r"ids: expected an integer tensor .*, got bool \[99\]"),
        (torch.zeros(99, dtype=torch.int16), 20, TypeError, r"ids: expected an integer tensor .*, got int16 \[99\]"),
        ([1, 2, 3], 2, TypeError, "ids: expected an integer tensor .*, got list"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), 2, TypeError, "ids: expected an integer tensor"),
    ],
)
def test_bad_arguments_are_named(ids, length, error, message):
    with pytest.raises(error, match=message):
        sparsekern.perplexity(tiny.llama(), ids, length)


def test_an_encoder_is_refused():
    with pytest.raises(TypeError, match="model: expected a causal language model, got BertModel, which predicts no next token"):
        sparsekern.perplexity(encoders.tiny("bert"), torch.zeros(99, dtype=torch.int64), 20)


def test_an_encoder_with_a_decoder_is_refused():
    sizes = dict(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(TypeError, match="expected a causal language model, got T5ForConditionalGeneration, which predicts no next"):
        sparsekern.perplexity(model, torch.zeros(99, dtype=torch.int64), 20)


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match="model: expected a transformers model, got str; sparsekern.load returns one"):
        sparsekern.perplexity("gpt2", torch.zeros(99, dtype=torch.int64))
