"""Packed folders that are damaged or contradict themselves: what is wrong is named."""

import json
import struct

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sparsekern
from sparsekern import SparseLinear
from tests.runtime import packed
from tests.runtime.test_packed_folder import UP


def _set(name: str, value):
    return lambda state: state.__setitem__(f"{UP}.{name}", value(state[f"{UP}.{name}"]))


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("values", lambda t: t[:-2]), f"model.safetensors: {UP}.values: expected BF16"),
        (_set("values", lambda t: t.half()), f"model.safetensors: {UP}.values: expected BF16 .* got F16"),
        (
            _set("starts", lambda t: t + (1 << 40)),
            f"model.safetensors: {UP}.starts: expected the first slot after the values of earlier tiles",
        ),
        (_set("bitmask", lambda t: torch.full_like(t, -1)), f"model.safetensors: {UP}.values: expected .* values for the bits set"),
        (_set("order", torch.zeros_like), f"model.safetensors: {UP}.order: expected each row from 0 to 95 once"),
        (lambda state: state.pop(f"{UP}.starts"), f"model.safetensors: {UP}.starts: is missing"),
    ],
)
def test_damaged_weights_are_named(damaged, change, message):
    damaged.tensors(change)
    for load in (sparsekern.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(damaged.path)


def test_truncated_and_garbled_files(damaged):
    whole = damaged.weights.read_bytes()
    for content in (whole[:-100], whole[:50], b"", struct.pack("<Q", 1 << 60) + whole[8:]):
        damaged.weights.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors: the file is damaged"):
            sparsekern.load(damaged.path)


@torch.no_grad()
def test_garbled_bytes_are_refused_or_are_only_numbers(damaged):
    whole = damaged.weights.read_bytes()
    data = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:data])
    generator, refused = torch.Generator().manual_seed(0), 0
    names = [name for name in header if UP in name or "1.self_attn.q_proj" in name]
    for trial in range(24):
        first, last = (data + offset for offset in header[names[trial % len(names)]]["data_offsets"])
        content = bytearray(whole)
        for place in torch.randint(first, last, (3,), generator=generator).tolist():
            content[place] ^= 1 << (place % 8)
        damaged.weights.write_bytes(content)
        try:
            sparsekern.load(damaged.path)(packed.ids())
        except ValueError as error:
            assert "model.safetensors: model.layers." in str(error)
            refused += 1
    assert refused >= 12  # all but those in values


def _entry(name: str, value):
    return lambda config: config["layers"][UP].__setitem__(name, value)


WHERE = rf"config.json: quantization_config.layers\['{UP}'\]"


@pytest.mark.parametrize(
    "change, message",
    [
        (_entry("format", "csr"), f"{WHERE}: format: expected 'bitmask', 'N:M', 'N:M-q4' or 'int8', got 'csr'"),
        (_entry("format", None), f"{WHERE}: format: expected"),
        (_entry("format", "9:64"), f"{WHERE}: "),
        (_entry("shape", [96, -64]), f"{WHERE}: shape: expected"),
        (
            _entry("shape", [64, 96]),
            rf"{WHERE}.shape: expected that of the model's layer, \[96, 64\], got \[64, 96\]|model.safetensors: ",
        ),
        (_entry("shape", "96"), f"{WHERE}: shape: expected"),
        (_entry("dtype", "int4"), f"{WHERE}.dtype: expected one of float32, bfloat16, float16, got 'int4'"),
        (_entry("stored", -1), f"{WHERE}: stored: expected"),
        (_entry("stored", 1 << 70), f"{WHERE}: stored|model.safetensors: {UP}.values: expected"),
        (_entry("stored", 64), f"model.safetensors: {UP}.values: expected BF16"),
        (_entry("more", 1), f"{WHERE}: expected format, shape, dtype and, of a bitmask, stored; got"),
        (lambda config: config.update(version=4), "config.json: quantization_config.version: this sparsekern reads 1 to 3, got 4"),
        (
            lambda config: config.update(version=True),
            "config.json: quantization_config.version: this sparsekern reads 1 to 3, got True",
        ),
        (lambda config: config["layers"].pop(UP), f"model.safetensors: {UP}.bitmask: belongs to a packed layer, .* no '{UP}'"),
        (
            lambda config: config["layers"].clear(),
            "bitmask: belongs to a packed layer, but quantization_config.layers has no 'model",
        ),
        (lambda config: config.update(extra=2), "config.json: quantization_config: unknown entry 'extra'"),
        (lambda config: config.pop("layers"), "config.json: quantization_config.layers: expected an entry for each packed layer"),
        (
            lambda config: config.update(layers=[1]),
            "config.json: quantization_config.layers: expected an entry for each packed layer",
        ),
        (
            lambda config: config["layers"].update({"model.embed_tokens": config["layers"][UP]}),
            r"model.embed_tokens.(values|bitmask|starts|order): is missing",
        ),
    ],
)
def test_configs_that_cannot_be(damaged, change, message):
    damaged.config(change)
    with pytest.raises(ValueError, match=message):
        sparsekern.load(damaged.path)


@pytest.mark.parametrize(
    "name, message", [("model.embed_tokens", "got that of a Embedding"), ("model.nothing", "has no such layer")]
)
def test_layers_that_are_no_linears(damaged, name, message):
    def rename(state):
        state.update({f"{name}.{part}": state.pop(f"{UP}.{part}") for part in ("values", "bitmask", "starts", "order")})

    damaged.tensors(rename)
    damaged.config(lambda config: config["layers"].update({name: config["layers"].pop(UP)}))
    with pytest.raises(ValueError, match=message):
        sparsekern.load(damaged.path)


def test_a_packed_head_is_not_tied_whatever_the_config_says(damaged):
    head = SparseLinear.from_linear(packed.prune_linears(nn.Linear(64, 320, bias=False, dtype=torch.bfloat16)), "bitmask")
    damaged.tensors(lambda state: state.update({f"lm_head.{name}": tensor for name, tensor in head.tensors.items()}))
    entry = {"format": "bitmask", "shape": [320, 64], "dtype": "bfloat16", "stored": head.values.numel()}
    damaged.config(lambda config: config["layers"].update({"lm_head": entry}))
    for load in (sparsekern.load, AutoModelForCausalLM.from_pretrained):
        model = load(damaged.path)
        assert torch.equal(model.lm_head.dense_weight(), head.dense_weight())
        assert not torch.equal(model.lm_head.dense_weight(), model.get_input_embeddings().weight)


def test_a_folder_with_nothing_in_it_and_a_foreign_one(damaged, tmp_path):
    damaged.weights.unlink()
    with pytest.raises(ValueError, match="no model can be loaded from"):
        sparsekern.load(damaged.path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"quantization_config": {"quant_method": "sparsekern"}}')
    with pytest.raises(ValueError, match="no model can be loaded from"):
        sparsekern.load(foreign)
