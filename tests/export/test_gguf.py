"""`export_gguf`: files that other readers load to the same weights."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.cli import main
from sparsekern.export import gguf_file
from sparsekern.export.architectures import rotary_divisors
from tests import encoders, tiny

gguf = pytest.importorskip("gguf", reason="the extra sparsekern[gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra sparsekern[gguf] is not installed")

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # the size that transformers takes for a GGUF file of this family
}


def model_of(family: str, **changes):
    kind = family.split()[0]
    base = tiny.llama(**SHAPE).config
    shape = {name: getattr(base, name) for name in (*SHAPE, "vocab_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(0)
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 64, **shape, **FAMILIES[family], **changes}
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that differ from what they begin as
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def read(path):
    return tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def types(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def number(path, key: str):
    return gguf.GGUFReader(path).fields[key].contents()


@pytest.fixture(scope="module")
def of_4_bits():
    model = tiny.llama(**SHAPE)
    ids = torch.arange(480).view(8, 60) * 7 % 320
    sparsekern.prune(model, "magnitude", "2:4", ids, values="int4", progress=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model(family, tmp_path):
    model = model_of(family)
    path = sparsekern.export_gguf(model, tmp_path / "a.gguf")
    if family != "llama with biases":  # of which GGUF says nothing but by its tensors
        ids = torch.arange(12).view(1, 12)
        again = read(path)
        own = model.state_dict()
        assert own.keys() == again.state_dict().keys()
        assert all(torch.equal(own[name], value) for name, value in again.state_dict().items())
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    kinds = types(path)
    assert set(kinds.values()) == {"F32"} and len(kinds) == len(model.state_dict())
    assert ("blk.1.ffn_up.bias" in kinds) == ("biases" in family) and ("blk.1.attn_k.bias" in kinds) == (
        "biases" in family or family == "qwen2"
    )
    arch = "llama" if family[0] in "lm" else family
    assert number(path, f"{arch}.context_length") == (24 if family == "mistral" else 64)
    assert number(path, f"{arch}.rope.freq_base") == pytest.approx(model.config.rope_parameters["rope_theta"])


def test_rows_of_queries_alternate_between_the_halves_of_a_head(tmp_path):
    """With biases, whose GGUF file transformers has no config for."""
    model = model_of("llama with biases")
    path = sparsekern.export_gguf(model, tmp_path / "a.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    attention = model.model.layers[1].self_attn
    for name, own in (("attn_q", attention.q_proj), ("attn_k", attention.k_proj)):
        head = model.config.head_dim
        for row in range(own.out_features):
            start, place = row // head * head, row % head
            source = start + place // 2 + (place % 2) * head // 2
            assert found[f"blk.1.{name}.weight"][row].tolist() == own.weight[source].tolist()
            assert found[f"blk.1.{name}.bias"][row] == own.bias[source]
    assert found["blk.1.attn_v.bias"].tolist() == attention.v_proj.bias.tolist()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_4_bits_are_stored_without_loss(of_4_bits, tmp_path, dtype):
    dense = tiny.llama(**SHAPE)
    dense.load_state_dict(of_4_bits.state_dict())
    packed = sparsekern.pack(dense).to(dtype)
    path = sparsekern.export_gguf(packed, tmp_path / "packed.gguf")
    kinds = types(path)
    assert {kind for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_0"}
    assert kinds["token_embd.weight"] == ("F32" if dtype == torch.float32 else "BF16") and kinds["output_norm.weight"] == "F32"
    again = read(path)
    for name, own in of_4_bits.named_parameters():
        if ".layers." in name and own.dim() == 2:
            assert torch.equal(again.get_parameter(name), own), name
    if dtype == torch.float32:
        assert sparsekern.export_gguf(of_4_bits, tmp_path / "packed2.gguf").stat().st_size == path.stat().st_size
        assert all(torch.equal(own, again.get_parameter(name)) for name, own in of_4_bits.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("format", ["2:4", "bitmask"])
def test_other_packed_formats_hold_values_of_4_bits_too(of_4_bits, tmp_path, format):
    dense = tiny.llama(**SHAPE)
    dense.load_state_dict(of_4_bits.state_dict())
    path = sparsekern.export_gguf(sparsekern.pack(dense, format=format), tmp_path / "a.gguf")
    assert {kind for name, kind in types(path).items() if name.startswith("blk.") and "norm" not in name} == {"Q4_0"}
    again = read(path)
    assert all(torch.equal(own, again.get_parameter(name)) for name, own in of_4_bits.named_parameters())


@torch.no_grad()
def test_packed_models_keep_their_numbers(tmp_path):
    model = tiny.llama(**SHAPE).bfloat16()
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    path = sparsekern.export_gguf(sparsekern.pack(model), tmp_path / "a.gguf")
    assert types(path)["blk.1.attn_q.weight"] == "BF16"
    assert all(torch.equal(value, wanted[name].float()) for name, value in read(path).state_dict().items())


@torch.no_grad()
def test_a_dense_half_model_of_4_bits_is_on_the_same_grid(of_4_bits, tmp_path):
    half = tiny.llama(**SHAPE)
    half.load_state_dict(of_4_bits.state_dict())
    again = read(sparsekern.export_gguf(half.bfloat16(), tmp_path / "a.gguf"))
    for name, own in of_4_bits.named_parameters():
        if ".layers." in name and own.dim() == 2:
            torch.testing.assert_close(again.get_parameter(name), own, rtol=4e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "type, blocks, embedding, most",
    [("f16", "F16", "F16", 1e-3), ("q8_0", "Q8_0", "Q8_0", 0.02), ("q4_0", "Q4_0", "Q8_0", 0.2)],
)
def test_types_of_other_matrices(tmp_path, type, blocks, embedding, most):
    model = tiny.llama(**SHAPE)
    path = sparsekern.export_gguf(model, tmp_path / "a.gguf", type=type)
    kinds = types(path)
    assert kinds["blk.0.ffn_down.weight"] == blocks and kinds["token_embd.weight"] == kinds["output.weight"] == embedding
    again = read(path)
    for name, own in model.named_parameters():
        found = again.get_parameter(name)
        assert float((found - own).norm() / own.norm()) <= (most if own.dim() == 2 else 0)
    assert number(path, "general.file_type") == {"F16": 1, "Q8_0": 7, "Q4_0": 2}[blocks]
    odd = types(sparsekern.export_gguf(tiny.llama(), tmp_path / "b.gguf", type=type))
    assert odd["blk.0.ffn_down.weight"] == ("F32" if type[0] == "q" else blocks)  # rows of 48


def test_scaled_rotary_embeddings(tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny.llama(**SHAPE, rope_parameters=llama3)
    path = sparsekern.export_gguf(model, tmp_path / "a.gguf")
    wanted = []
    for pair in range(8):
        length = 2 * math.pi * 10000.0 ** (pair / 8)  # of the wave
        smooth = (32 / length - 1) / 3
        wanted.append(1.0 if length < 8 else 8.0 if length > 32 else 1 / ((1 - smooth) / 8 + smooth))
    assert wanted[0] == 1 and wanted[-1] == 8 and any(1 < value < 8 for value in wanted)
    torch.testing.assert_close(rotary_divisors(model.config).tolist(), wanted, rtol=1e-5, atol=0)
    found = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
    assert found.data.tolist() == rotary_divisors(model.config).tolist()
    linear = tiny.llama(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})
    path = sparsekern.export_gguf(linear, path, overwrite=True)
    assert (number(path, "llama.rope.scaling.type"), number(path, "llama.rope.scaling.factor")) == ("linear", 4.0)


def test_what_is_refused(tmp_path, monkeypatch):
    model, path = tiny.llama(**SHAPE), tmp_path / "a.gguf"
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for given, message in (
        (encoders.tiny("bert_classifier"), "model: expected one of llama, mistral, qwen2, qwen3 to write as GGUF, got bert"),
        (torch.nn.Linear(4, 4), "model: expected one of .* got Linear"),
        (tiny.llama(rope_parameters=yarn), "model: expected rope_parameters.rope_type default or linear or llama3 in the config"),
        (tiny.llama(hidden_act="gelu"), "model: expected hidden_act silu in the config of a llama, as llama.cpp has it, got gelu"),
        (model_of("qwen3", attention_bias=True), "model: expected attention_bias False in the config of a qwen3"),
        (tf.LlamaForSequenceClassification(model.config), "model: expected a causal language model with a head, got LlamaForSeq"),
        (model.model, "model: expected a causal language model with a head, got LlamaModel"),
        (tiny.llama(**SHAPE).double(), "model: expected weights in float32, float16 or bfloat16, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsekern.export_gguf(given, path)
    with pytest.raises(ValueError, match="type: expected one of 'auto', 'f32', .* got 'q5_k'"):
        sparsekern.export_gguf(model, path, type="q5_k")
    with pytest.raises(ValueError, match=r"path: expected a file name that ends in \.gguf, got 'a.bin'"):
        sparsekern.export_gguf(model, tmp_path / "a.bin")
    with pytest.raises(TypeError, match="path: expected the path of a file, got 3"):
        sparsekern.export_gguf(model, 3)
    with pytest.raises(FileNotFoundError, match="path: expected an existing folder for 'a.gguf'"):
        sparsekern.export_gguf(model, tmp_path / "none" / "a.gguf")
    with pytest.raises(ValueError, match="model: expected one in memory, got a streamed one"):
        sparsekern.export_gguf(sparsekern.load(tiny.save_folder(tmp_path / "folder"), stream=True), path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3:5] = torch.tensor([1e5, torch.inf])
    with pytest.raises(ValueError, match=r"type: expected 'f32' or 'bf16' for weights above 65,504 \(blk.1.ffn_up.weight\)"):
        sparsekern.export_gguf(model, path, type="f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))  # nothing is left of the one that failed half-way
    path.touch()
    with pytest.raises(FileExistsError, match="path: '.*a.gguf' exists; pass overwrite=True to replace a file"):
        sparsekern.export_gguf(model, path)
    path.unlink()
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match="path: no space left: expected .* MB for the file, got 1 MB that are free"):
        sparsekern.export_gguf(model, path)
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf is needed to write GGUF files: pip install 'sparsekern\[gguf\]'"):
        sparsekern.export_gguf(model, path)


def test_the_command(tmp_path, capsys):
    folder, path = str(tiny.save_folder(tmp_path / "model", **SHAPE)), tmp_path / "a.gguf"
    assert main(["export", folder, "--gguf", str(path)]) == 1
    assert "export: error: tokenizer: expected one that splits text as GPT-2, SmolLM2" in capsys.readouterr().err
    assert main(["export", folder, "--gguf", str(path), "--type", "q8_0", "--no-tokenizer"]) == 0
    assert f"wrote {path}: 23 Q8_0, 7 F32; " in capsys.readouterr().out
    assert main(["export", folder, "--gguf", str(path), "--no-tokenizer"]) == 2
    assert "exists; pass overwrite=True" in capsys.readouterr().err
    assert main(["export", folder, "--gguf", str(path), "--no-tokenizer", "--overwrite"]) == 0
    assert number(path, "tokenizer.ggml.model") == "none"


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_8_bits_is_stored_without_loss(tied, tmp_path):
    model = sparsekern.pack(tiny.llama(**SHAPE, tie_word_embeddings=tied), head="int8")
    path = sparsekern.export_gguf(model, tmp_path / "a.gguf", type="f32")
    name = "token_embd.weight" if tied else "output.weight"
    assert {own for own, kind in types(path).items() if kind == "Q8_0"} == {name} and ("output.weight" in types(path)) != tied
    assert torch.equal(stored(path, name), model.lm_head.dense_weight())


@torch.no_grad()
def test_rows_whose_scale_float16_lacks_are_rounded_again_and_counted(tmp_path):
    model = sparsekern.pack(tiny.llama(**SHAPE), head="int8")
    scales = model.lm_head.scales
    scales[3], scales[5], scales[7] = 3.3e-7, 1e-9, 0.0
    with pytest.warns(UserWarning, match="^2 rows of 8-bit values are rounded again, since float16 does not hold their scales$"):
        path = sparsekern.export_gguf(model, tmp_path / "a.gguf")
    error = (stored(path, "output.weight") - model.lm_head.dense_weight()).abs().amax(1)
    assert 0 < error[3] <= 128 * 2.0**-25 and 0 < error[5] <= 127e-9 and error[7] == 0 and error[8:].max() == 0
    scales[3] = 1e5
    with pytest.raises(ValueError, match="^model: output.weight: scales: expected at most 65,504, got 1e.05 in row 3$"):
        sparsekern.export_gguf(model, tmp_path / "b.gguf")


def stored(path, name: str) -> torch.Tensor:
    """A tensor of a file in float32, as the package gguf reads it."""
    (tensor,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
