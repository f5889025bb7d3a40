"""Models whose kept weights have 4 bits: pruned, packed, saved, loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import sparsekern
from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.layouts.q4_grid import grid_scales, is_on_grid
from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.ops.nm_linear import sparse_weight
from sparsekern.ops.nm_q4_linear import random_scales
from sparsekern.runtime import SparseLinear
from sparsekern.runtime.formats import NMQ4Packed, format_of
from tests import tiny

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def weight_of_4_bits(rows: int, columns: int, generator: torch.Generator, n: int = 2, m: int = 4) -> torch.Tensor:
    scales = random_scales(rows, columns, generator)
    blocks = nm_q4_pack(sparse_weight(rows, columns, n, m, torch.float32, generator), scales, n, m)
    return nm_q4_unpack(blocks, n, m, rows, columns)[0]


@pytest.fixture(scope="module")
def model():
    ids = torch.arange(480).view(8, 60) * 7 % 320
    model = tiny.llama(hidden_size=64, intermediate_size=144)
    report = sparsekern.prune(model, "sparsegpt", "2:4", ids, values="int4", progress=False)
    return model, report


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return sparsekern.save(model[0], tmp_path_factory.mktemp("four") / "bits", "packed")


@FLOATS
def test_scales_are_found_again(generator, dtype):
    weight = weight_of_4_bits(37, 200, generator)
    weight[3, :COLUMNS] = 0
    stored = weight.to(dtype)
    scales = grid_scales(stored)
    again = scales.double().repeat_interleave(COLUMNS, 1)[:, :200]
    codes = (weight.double() / again.where(again != 0, 1)).round()
    tolerance = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((codes * again - weight.double()).abs() <= tolerance * weight.double().abs()).all() and codes.abs().max() <= 8
    assert is_on_grid(stored) and (scales[3, 0] == 0)
    stored[20, 70:72] = torch.tensor([0.1234, 0.777]).to(dtype)
    assert grid_scales(stored) is None and not is_on_grid(stored)


def test_weights_of_few_distinct_values_are_not_taken_for_4_bits():
    assert not is_on_grid(torch.zeros(8, 64)) and not is_on_grid(torch.randn(8, 64).sign())
    assert not is_on_grid(torch.randn(8, 64).bfloat16())


@FLOATS
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 16)])
def test_a_layer_keeps_its_weight_and_multiplies(generator, dtype, n, m):
    linear = nn.Linear(96, 20, dtype=dtype)
    linear.weight = nn.Parameter(weight_of_4_bits(20, 96, generator, n, m).to(dtype))
    layer = SparseLinear.from_linear(linear, f"{n}:{m}-q4")
    assert layer.dtype == dtype and layer.device.type == "cpu" and layer.density == n / m
    tolerance = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.to_linear().weight, linear.weight, rtol=tolerance, atol=0)
    linear.requires_grad_(False)
    x = torch.randn(3, 96, generator=generator).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and float((y - linear(x)).norm() / linear(x).norm()) < 0.02
    for other in (torch.bfloat16, torch.float32):
        moved = layer.to(other)
        assert moved.dtype == other and moved(x.to(other)).dtype == other and moved.blocks.dtype == torch.uint8
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got float64"):
        layer.to(torch.float64)


def test_every_kept_weight_of_a_pruned_model_is_on_a_grid(model):
    pruned, report = model
    for layer in report.layers:
        weight = pruned.get_submodule(layer.name).weight
        assert (weight.view(len(weight), -1, 4) != 0).sum(-1).max() <= 2 and is_on_grid(weight)
        assert 0 < layer.values_error < layer.error
    assert report.settings["method"]["values"] == "int4" and report.settings["method"]["name"] == "sparsegpt"


@torch.no_grad()
def test_a_packed_folder_holds_4_bits_and_runs(model, folder):
    pruned, _ = model
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2 and {entry["format"] for entry in config["layers"].values()} == {"2:4-q4"}
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert state[f"{name}.blocks"].nbytes == 18 * 208  # 144 rows of 64 columns
    ids = torch.arange(12).view(1, 12)
    dense = pruned(input_ids=ids).logits
    for loaded in (sparsekern.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(loaded.get_submodule(name), SparseLinear)
        assert torch.equal(loaded.get_submodule(name).dense_weight(), pruned.get_submodule(name).weight)
        logits = loaded(input_ids=ids).logits
        assert float((logits - dense).norm() / dense.norm()) < 0.05
        assert sparsekern.runtime.count_zeros(loaded)[0] <= sparsekern.runtime.count_zeros(pruned)[0]
    half = sparsekern.load(folder, dtype="bfloat16")
    assert half.get_submodule(name).dtype == torch.bfloat16 and half(input_ids=ids).logits.dtype == torch.bfloat16
    assert torch.equal(sparsekern.unpack(sparsekern.load(folder)).get_submodule(name).weight, pruned.get_submodule(name).weight)


@pytest.mark.parametrize(
    "byte, values, message",
    [
        (0, [0, 0], "expected 2 ascending positions in every group"),
        (192, [0, 0x7C], "expected finite scales, got inf in row 0, block 0"),
    ],
)
def test_damaged_blocks_are_refused(folder, tmp_path, byte, values, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    state["model.layers.1.mlp.up_proj.blocks"][0, 0, byte : byte + 2] = torch.tensor(values, dtype=torch.uint8)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"model.safetensors: model.layers.1.mlp.up_proj.blocks: {message}"):
        sparsekern.load(copy)


def test_a_layer_that_config_json_lacks_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["layers"]["model.layers.1.mlp.up_proj"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="up_proj.blocks: belongs to a packed layer, but quantization_config.layers has no"):
        sparsekern.load(copy)


def test_what_is_refused_before_anything_changes(generator):
    model = tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(64).view(4, 16)
    for options, message in (
        ({"values": "int3"}, "values: expected 'int4' or None, got 'int3'"),
        (
            {"values": "int4", "pattern": "5:16"},
            "values: expected pattern 2:4, 1:4 or 4:16 with 'int4', got 5:16 for model.layers.0",
        ),
        ({"values": "int4", "pattern": 0.5}, "values: expected pattern 2:4, 1:4 or 4:16 with 'int4', got"),
        ({"values": "int4", "method": "sparsellm"}, "values: expected None, or a method that solves one linear at a time"),
        ({"values": "int4", "method": "gradual"}, "values: expected None, or a method that solves one linear at a time"),
        ({"values": "int4", "leaves": 2}, "values: expected None for sums in 2 parts"),
        ({"values": "int4", "calibration": None}, "calibration: expected token ids"),
    ):
        arguments = {"method": "magnitude", "pattern": "2:4", "calibration": ids, "progress": False} | options
        with pytest.raises(ValueError, match=message):
            sparsekern.prune(model, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="weight: expected values of 4 bits for format '2:4-q4', multiples of a scale"):
        NMQ4Packed(2, 4).pack(sparse_weight(8, 64, 2, 4, torch.float32, generator))
    with pytest.raises(ValueError, match="n, m: expected 2:4, 1:4 or 4:16, which have a layout with 4-bit values, got 5:16"):
        format_of("5:16-q4")
