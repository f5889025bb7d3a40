"""Encoders as chains of sub-layers, and what is left of them when units are cut out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.models.encoder import Encoder
from sparsekern.models.units import keep_units, record_units
from tests import encoders
from tests.models.families import tiny_model
from tests.tiny import llama

EVERY_MODEL = pytest.mark.parametrize("name", encoders.MODELS)


def cut(model, heads: list[list[int]], neurons: list[list[int]]) -> None:
    encoder = Encoder(model)
    with torch.no_grad():
        for sublayer in encoder.sublayers:
            keep_units(sublayer, torch.tensor((heads if sublayer.kind == "heads" else neurons).pop(0), dtype=torch.long))
    record_units(encoder)


def silenced(model, heads: list[list[int]], neurons: list[list[int]]):
    """The whole model, in which the output projections read nothing of the units that are not listed."""
    model = copy.deepcopy(model)
    for sublayer in Encoder(model).sublayers:
        kept = (heads if sublayer.kind == "heads" else neurons).pop(0)
        gone = torch.tensor([unit not in kept for unit in range(sublayer.units)]).repeat_interleave(sublayer.head_size)
        sublayer.out.weight.data[:, gone] = 0
    return model


def kept_units(units: int) -> tuple[list[list[int]], list[list[int]]]:
    return [[0, 2], [], [3]], [list(range(0, units, 3)), [], [7, 1]]


def first_output(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@EVERY_MODEL
def test_the_sublayers_make_up_the_model(name):
    model, batch = encoders.tiny(name), encoders.padded_ids()
    expected, modules = first_output(model, batch), list(model.modules())
    encoder = Encoder(model)
    assert [s.kind for s in encoder.sublayers] == ["heads", "neurons"] * 3
    with torch.no_grad(), encoder.opened(batch) as chain:
        states = []
        for start in range(6):
            seen = []
            stored = states[-1] if states else None
            output = chain.run(batch, start, stored, lambda index, x: (seen.append(index), x)[1])  # noqa: B023
            torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)
            assert seen == list(range(start, 6))
            states.append(next_state(encoder, chain, start, states[-1] if states else chain.embedded))
    assert list(model.modules()) == modules  # and all is as it was
    assert torch.equal(first_output(model, batch), expected)


def next_state(encoder, chain, index, x):
    sublayer = encoder.sublayers[index]
    return sublayer.norm(x + sublayer.out(sublayer.features(x, chain.attention_mask)))


@EVERY_MODEL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cutting_units_out_is_silencing_them(name, attention):
    model, batch = encoders.tiny(name), encoders.padded_ids()
    model.set_attn_implementation(attention)
    neurons = Encoder(model).sublayers[1].units
    expected = first_output(silenced(model, *kept_units(neurons)), batch)
    before = sum(p.numel() for p in model.parameters())
    cut(model, *kept_units(neurons))
    torch.testing.assert_close(first_output(model, batch), expected, rtol=1e-4, atol=1e-5)
    hidden, head_size = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads
    gone = sum(model.config.num_attention_heads - n for n in (2, 0, 1)), sum(neurons - n for n in (-(-neurons // 3), 0, 2))
    assert before - sum(p.numel() for p in model.parameters()) == gone[0] * (4 * hidden + 3) * head_size + gone[1] * (
        2 * hidden + 1
    )


@EVERY_MODEL
def test_saved_and_loaded_it_is_the_same_model(name, tmp_path):
    model, batch = encoders.tiny(name), encoders.padded_ids()
    cut(model, *kept_units(40))
    sparsekern.save(model, tmp_path / "cut")
    loaded = sparsekern.load(tmp_path / "cut", device="cpu")
    assert type(loaded) is type(model)
    encoders.assert_same_weights(loaded, model)
    torch.testing.assert_close(first_output(loaded, batch), first_output(model, batch))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["sparsekern_units"] == {
        "heads": [2, 0, 1],
        "neurons": [14, 0, 2],
    }
    assert "sparsekern.load(" in (tmp_path / "cut" / "README.md").read_text()
    sparsekern.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_what_is_left_can_be_exported_and_trained(name):
    model, batch = encoders.tiny(name), encoders.padded_ids()
    cut(model, *kept_units(48))
    exported = torch.export.export(model, (), batch).module()
    torch.testing.assert_close(exported(**batch)[0], first_output(model, batch), rtol=1e-4, atol=1e-5)
    model.train()(**batch)[0].square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.numel() and "pooler" not in n)


@pytest.mark.parametrize(
    "units", [{"heads": [1, 1, 1]}, {"heads": [5, 1, 1], "neurons": [1, 1, 1]}, {"heads": [1], "neurons": [1]}, 3]
)
def test_a_config_that_cannot_be_is_refused(tmp_path, units):
    model = encoders.tiny("bert")
    cut(model, *kept_units(48))
    model.config.sparsekern_units = units
    sparsekern.save(model, tmp_path / "cut")
    with pytest.raises(
        ValueError, match=r"sparsekern_units.(heads|neurons) in config.json: expected 3 whole numbers from 0 to (4|48)"
    ):
        sparsekern.load(tmp_path / "cut", device="cpu")


def test_whole_encoders_are_loaded_as_what_they_are(tmp_path):
    for name in ("bert_classifier", "distilbert"):
        encoders.tiny(name).save_pretrained(tmp_path / name)
        assert type(sparsekern.load(tmp_path / name, device="cpu")) is type(encoders.tiny(name))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(), "LlamaForCausalLM is a decoder"),
        (lambda: tiny_model("gpt2"), "GPT2LMHeadModel is a decoder"),
        (lambda: tf.BertLMHeadModel(tf.BertConfig(**encoders.SIZES, is_decoder=True)), "BertLMHeadModel is a decoder"),
        (
            lambda: tf.ViTModel(tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)),
            "ViTModel",
        ),
        (
            lambda: tf.ModernBertModel(
                tf.ModernBertConfig(
                    **{name: encoders.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")},
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    **{f"{token}_token_id": 1 for token in ("bos", "eos", "cls", "sep")},
                )
            ),
            "layers.0 of ModernBertModel holds",
        ),
    ],
    ids=["llama", "gpt2", "bert decoder", "vit", "modernbert"],
)
def test_other_architectures_are_named(model, message):
    with pytest.raises(ValueError, match=f"model: expected an encoder whose blocks are attention .*{message}"):
        model = model()
        with Encoder(model).opened({"pixel_values": torch.randn(1, 3, 224, 224)}):
            pass


def test_layers_that_are_shared_are_refused():
    config = tf.AlbertConfig(
        vocab_size=96, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = tf.AlbertModel(config).eval()
    with pytest.raises(
        ValueError, match="albert_layer_groups.0 of AlbertModel does not compute its attention and its FFN in a module each"
    ):
        Encoder(model)


def test_sublayers_that_do_not_make_up_the_model_are_refused():
    """Whatever it may be that a block does besides; here it doubles its input."""
    model = encoders.tiny("bert")
    block = model.encoder.layer[0]
    block.forward = lambda x, *args, **kwargs: type(block).forward(block, 2 * x, *args, **kwargs)
    with pytest.raises(ValueError, match="the blocks of BertModel compute something else"):
        with Encoder(model).opened(encoders.padded_ids()):
            pass
