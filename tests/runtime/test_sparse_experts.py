"""Packed experts of every layout: the same outputs as the dense model, in memory and through a folder, and the same weights unpacked."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern.models.expert_layouts import find_experts
from sparsekern.runtime.sparse_experts import PackedExperts, SparseExperts
from tests.models.test_experts import MIXTURES, tiny_ids, tiny_mixture

EVERY_KIND = pytest.mark.parametrize("kind", MIXTURES)


def sparse_mixture(kind: str, pattern: str = "half") -> torch.nn.Module:
    """Return a tiny mixture whose experts are pruned, each expert with other zeros."""
    model = tiny_mixture(kind)
    generator = torch.Generator().manual_seed(3)
    for experts in find_experts(model):
        for part in experts.parts:
            weight = experts.stacked(part)
            if pattern == "half":
                weight.mul_(torch.rand(weight.shape, generator=generator) < 0.5)
            else:
                order = torch.rand((*weight.shape[:2], weight.shape[2] // 4, 4), generator=generator).argsort(-1)
                weight.mul_((order < 2).flatten(2))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids(2, 9)).logits


def packed_parameters(model: torch.nn.Module) -> dict[str, SparseExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseExperts)}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@EVERY_KIND
@pytest.mark.parametrize("pattern", ["half", "2:4"])
def test_packed_and_unpacked(kind, pattern):
    model = sparse_mixture(kind, pattern)
    expected, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    format = "bitmask" if pattern == "half" else pattern
    assert sparsekern.pack(model, format, include="*.experts.*") is model
    found = packed_parameters(model)
    assert {layer.format for layer in found.values()} == {format} and not find_experts(model)
    if pattern == "half":  # rows of 16 inputs get no smaller as 2:4
        assert len(found) == sum(3 if kind == "dbrx" else 2 for _ in find_experts(sparse_mixture(kind)))
    assert_close(logits(model), expected)
    assert_close(logits(copy.deepcopy(model)), expected)
    sparsekern.unpack(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert set(model.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@EVERY_KIND
def test_through_a_folder(kind, tmp_path):
    """A folder holds the experts packed only; both ways to load it, and unpacked it is saved like the dense model."""
    model = sparse_mixture(kind)
    expected = logits(model)
    sparsekern.save(model, tmp_path / "packed", "packed")
    sparsekern.save(model, tmp_path / "dense")
    for loaded in (
        sparsekern.load(tmp_path / "packed", device="cpu"),
        type(model).from_pretrained(tmp_path / "packed"),
    ):
        assert packed_parameters(loaded)
        assert_close(logits(loaded), expected)
    names = set(load_file(tmp_path / "packed" / "model.safetensors"))
    assert not any(name.endswith((".gate_up_proj", ".down_proj", ".w1")) or ".experts.0." in name for name in names)
    sparsekern.save(loaded, tmp_path / "again", "packed")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names
    sparsekern.unpack(loaded).save_pretrained(tmp_path / "unpacked")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    unpacked = load_file(tmp_path / "unpacked" / "model.safetensors")
    assert set(unpacked) == set(dense) and all(torch.equal(unpacked[name], dense[name]) for name in dense)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_choice_of_an_implementation_changes_nothing(implementation):
    model = sparsekern.pack(sparse_mixture("qwen3_moe"))
    expected = logits(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "dbrx", "llama4"])
def test_one_of_the_matrices_stays_dense(kind):
    model = sparse_mixture(kind)
    expected = logits(model)
    names = ["*.mlp.w2"] if kind == "dbrx" else ["*.down_proj"]
    sparsekern.pack(model, include=names)
    found = packed_parameters(model)
    assert found and all(name.endswith(("packed_w2", "packed_down_proj")) for name in found)
    assert_close(logits(model), expected)


def test_globs_may_name_a_matrix_of_an_expert():
    model = sparse_mixture("qwen3_moe")
    sparsekern.pack(model, include="model.layers.1.mlp.experts.2.up_proj")
    assert list(packed_parameters(model)) == ["model.layers.1.mlp.experts.packed_gate_up_proj"]


def test_experts_that_get_no_smaller_stay_dense():
    model = tiny_mixture("mixtral")
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            parameter.data.mul_(torch.rand_like(parameter) < 0.3)
    layers = len(find_experts(model))
    sparsekern.pack(model)
    assert not packed_parameters(model) and len(find_experts(model)) == layers > 0


def test_a_packed_model_generates_and_counts_its_weights(tmp_path):
    model = sparse_mixture("qwen3_moe")
    zeros = sparsekern.runtime.count_zeros(model)
    dense = model.generate(tiny_ids(1, 4), max_new_tokens=4, do_sample=False)
    size = sparsekern.runtime.weight_bytes(model)
    sparsekern.pack(model)
    assert sparsekern.runtime.count_zeros(model) == zeros
    assert sparsekern.runtime.weight_bytes(model) < size
    assert torch.equal(model.generate(tiny_ids(1, 4), max_new_tokens=4, do_sample=False), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = sparsekern.pack(sparse_mixture("gpt_oss"))
    moved = copy.deepcopy(model).to(dtype)
    assert {layer.dtype for layer in packed_parameters(moved).values()} == {dtype}
    dense = sparsekern.unpack(copy.deepcopy(model)).to(dtype)
    torch.testing.assert_close(logits(moved), logits(dense), rtol=5e-2, atol=5e-2)
    back = sparsekern.unpack(moved.to(torch.float32))
    for ours, theirs in zip(back.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


def test_under_autocast():
    model = sparsekern.pack(sparse_mixture("qwen3_moe").bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


def test_gradients_flow_through_packed_experts():
    model, found = sparse_mixture("gpt_oss"), []
    for packed in (False, True):
        if packed:
            sparsekern.pack(model, include="*.experts.*_proj")
        model.zero_grad()
        model(tiny_ids(2, 9)).logits.square().mean().backward()
        found.append([model.model.embed_tokens.weight.grad, model.model.layers[0].mlp.experts.down_proj_bias.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "dbrx"])
def test_copies_and_pickles(kind):
    model = sparsekern.pack(sparse_mixture(kind))
    expected = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), expected)


def test_a_packed_parameter_can_be_read():
    model = sparse_mixture("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    parameter = experts.gate_up_proj.detach().clone()
    sparsekern.pack(model)
    assert isinstance(experts, PackedExperts)
    weight = experts.gate_up_proj
    assert weight.shape == parameter.shape and weight.dtype == parameter.dtype
    assert torch.equal(weight[1] + 0, parameter[1])
    with pytest.raises(ValueError, match="weight: expected to be read only, since it is packed"):
        weight.mul_(2)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        experts.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("part", ["values", "order"])
def test_a_missing_tensor_is_an_error(tmp_path, part):
    file = sparsekern.save(sparse_mixture("qwen3_moe"), tmp_path / "packed", "packed") / "model.safetensors"
    tensors = load_file(file)
    missing = f"model.layers.1.mlp.experts.packed_down_proj.{part}"
    del tensors[missing]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{missing}: is missing"):
        sparsekern.load(tmp_path / "packed", device="cpu")
    with pytest.raises(ValueError, match=f"{missing}: is missing"):
        type(tiny_mixture("qwen3_moe")).from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("order", lambda t: t * 0, r"packed_down_proj\.order: expected each row from 0 to 31 once \(expert 0\)"),
        ("starts", lambda t: t + 1, r"packed_down_proj\.starts: expected expert 0 to begin at slot 0, got 1"),
        ("bitmask", lambda t: t * 0, "packed_down_proj.values: expected .* values for the bits set in bitmask"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, name, change, message):
    file = sparsekern.save(sparse_mixture("qwen3_moe"), tmp_path / "packed", "packed") / "model.safetensors"
    tensors = load_file(file)
    place = f"model.layers.1.mlp.experts.packed_down_proj.{name}"
    tensors[place] = change(tensors[place])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        sparsekern.load(tmp_path / "packed", device="cpu")


def test_other_experts_than_the_config_says_are_refused(tmp_path):
    folder = sparsekern.save(sparse_mixture("qwen3_moe"), tmp_path / "packed", "packed")
    config = json.loads((folder / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    name = "model.layers.1.mlp.experts.packed_down_proj"
    for wrong, message in (
        ({name.replace("layers.1", "layers.9"): layers[name]}, "Qwen3MoeForCausalLM has no such experts"),
        ({name: layers[name] | {"shape": [4, 31, 16]}}, r"expected I64 \[4, 31, 1\] by config.json, got I64 \[4, 32, 1\]"),
        (
            {name: layers[name] | {"shape": [4, 32, 15]}},
            r"shape: expected that of the model's experts, \[4, 32, 16\], got \[4, 32, 15\]",
        ),
        ({name: layers[name] | {"shape": [4, 32, 16, 1]}}, "shape: expected"),
    ):
        config["quantization_config"]["layers"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            sparsekern.load(folder, device="cpu")


def test_what_is_refused():
    layer = SparseExperts.of(torch.ones(2, 3, 8).triu(), 2, False, "bitmask")
    experts = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="x: expected torch.float32, the dtype of the packed values, got torch.bfloat16"):
        layer(torch.ones(4, 8).bfloat16(), experts)
    with pytest.raises(ValueError, match="x: expected 8 input features, got 7"):
        layer(torch.ones(4, 7), experts)
    with pytest.raises(ValueError, match=r"shape: expected \(experts, out_features, in_features\)"):
        SparseExperts("bitmask", (2, 3), layer.tensors, stored=torch.Size((2, 3)), transposed=False)
    with pytest.raises(ValueError, match="weight: expected at most 1 non-zeros in every 4 inputs"):
        SparseExperts.of(torch.ones(2, 3, 8), 2, False, "1:4")
    model = sparse_mixture("qwen3_moe")
    model.model.layers[0].mlp.experts.forward = lambda *args: None
    with pytest.raises(ValueError, match="experts.gate_up_proj: expected no hooks, since packing would lose them"):
        sparsekern.pack(model)
