"""The config of a saved model says of the weights what is so: whether they are tied, and how they are quantised."""

import json

import pytest
import torch
import transformers as tf
from torch import nn

import sparsekern
from tests.models.families import COMMON, LLAMA_LIKE
from tests.models.test_architecture import gemma3

T5 = dict(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0)


def gemma3_tied():
    model = gemma3()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


TIED = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "vision and language": gemma3_tied,
    "T5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
}


def logits(model):
    ids = torch.arange(3, 19)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("name", TIED)
def test_a_head_that_was_untied_stays_untied(tmp_path, name, format):
    """Under a config that says tied. T5's encoder and decoder stay tied to each other."""
    torch.manual_seed(0)
    model = TIED[name]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
        model.lm_head.weight.mul_(2)
    expected = logits(model)
    path = sparsekern.save(model, tmp_path / "out", format)
    for load in (type(model).from_pretrained, lambda path: sparsekern.load(path, device="cpu")):
        again = load(path)
        torch.testing.assert_close(logits(again), expected)
        assert isinstance(again.lm_head, sparsekern.SparseLinear) == (format == "packed")
    if name != "T5":  # whose config ties the embeddings of its two stacks as well
        text = json.dumps(json.loads((path / "config.json").read_text()))
        assert '"tie_word_embeddings": false' in text and '"tie_word_embeddings": true' not in text
    assert model.config.tie_word_embeddings
    again = sparsekern.load(sparsekern.save(again, tmp_path / "again"), device="cpu")
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_stays_tied(tmp_path, name):
    torch.manual_seed(0)
    model = TIED[name]()
    again = sparsekern.load(sparsekern.save(model, tmp_path / "out"), device="cpu")
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore:model.vision_tower.encoder.layers")  # it stays dense
@pytest.mark.parametrize("format", ["dense", "2:4"])
def test_a_quantisation_that_is_no_more_is_not_saved(tmp_path, format):
    """Neither that of the model nor of a part of it; the description of packed layers is."""
    model = gemma3()
    stale = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.config.quantization_config = dict(stale)
    model.config.text_config.quantization_config = dict(stale)
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    path = sparsekern.save(model, tmp_path / "out", format)
    config = json.loads((path / "config.json").read_text())
    assert "fp8" not in json.dumps(config) and ("quantization_config" in config) == (format == "2:4")
    assert "quantization_config" not in config["text_config"] and model.config.quantization_config == stale
    again = tf.Gemma3ForConditionalGeneration.from_pretrained(path)
    torch.testing.assert_close(logits(again), logits(model))


def test_files_of_a_quantisation_that_is_no_more_are_not_saved(tmp_path):
    TIED["llama"]().save_pretrained(tmp_path / "a")
    for name in ("quantize_config.json", "hf_quant_config.json", "other.json"):
        (tmp_path / "a" / name).write_text("{}")
    path = sparsekern.save(sparsekern.load(tmp_path / "a", device="cpu"), tmp_path / "b")
    assert {"quantize_config.json", "hf_quant_config.json", "other.json"} & {p.name for p in path.iterdir()} == {"other.json"}
