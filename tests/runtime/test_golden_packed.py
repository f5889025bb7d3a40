"""Folders saved packed by an earlier version: they load, and hold the weights that they were packed from.

`golden_packed/<dtype>` is a Llama of two blocks with linears as bitmask and as 2:4, saved by commit 46d0807. Beside it are the
SHA-256 of each dense weight before packing, and the logits of the loaded model on one batch of token ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsekern
from sparsekern.runtime import SparseLinear
from sparsekern.runtime.formats import format_of
from tests.ops.strategies import bits

FOLDER = Path(__file__).parent / "golden_packed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

pytestmark = pytest.mark.parametrize("name", DTYPES)


def packed_layers(name: str) -> dict[str, SparseLinear]:
    model = sparsekern.load(FOLDER / name, device="cpu", dtype=DTYPES[name])
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


def test_dense_weights_are_those_that_were_packed(name):
    digests = json.loads((FOLDER / f"{name}_dense.sha256.json").read_text())
    layers = packed_layers(name)
    assert {layer.format for layer in layers.values()} == {"bitmask", "2:4"}
    found = {f"{path}.weight": hashlib.sha256(bits(layer.dense_weight())).hexdigest() for path, layer in layers.items()}
    assert found == digests


def test_packing_the_dense_weights_gives_the_stored_tensors(name):
    stored = load_file(FOLDER / name / "model.safetensors")
    for path, layer in packed_layers(name).items():
        for key, tensor in format_of(layer.format).pack(layer.dense_weight()).items():
            assert bits(tensor) == bits(stored[f"{path}.{key}"]), f"{path}.{key}"


def test_logits_are_those_of_the_version_that_saved_it(name):
    expected = load_file(FOLDER / f"{name}_expected.safetensors")
    model = sparsekern.load(FOLDER / name, device="cpu", dtype=DTYPES[name])
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    # Sums in another order: the last digit of a hidden state may differ from machine to machine.
    tolerance = 1e-4 if name == "float32" else 0.15
    torch.testing.assert_close(logits.float(), expected["logits"].float(), rtol=0, atol=tolerance)
