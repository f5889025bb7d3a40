"""A few families in bfloat16: the weights that are left keep their bits, and so do both folders."""

import pytest
import torch

import sparsekern
from tests.models.zoo import ZOO
from tests.models.zoo.checks import assert_same_weights, check_decisions, check_folders

pytestmark = pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "bamba"])
def test_family_in_bfloat16(name, tmp_path):
    family = ZOO[name]
    family.model().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = sparsekern.load(tmp_path / "dense", device="cpu")
    assert model.dtype == torch.bfloat16
    report = sparsekern.prune(
        model, "wanda", "2:4", calibration=family.calibration(), out=tmp_path / "pruned", progress=False, **family.options
    )
    check_folders(tmp_path / "dense", tmp_path / "pruned", sum(layer.zeros for layer in report.layers))
    assert report.sparsity == 0.5
    assert_same_weights(sparsekern.load(tmp_path / "pruned", device="cpu"), model)
    packed = sparsekern.load(sparsekern.save(model, tmp_path / "packed", "packed"), device="cpu")
    with torch.no_grad():
        found, expected = (each(**family.samples()[0]).logits.float() for each in (packed, model))
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert_same_weights(sparsekern.unpack(packed), model)


@pytest.mark.parametrize("name", ["llama"])
def test_decisions_in_bfloat16(name):
    """By the inputs as the model computes them: one sample a batch, since padded products round otherwise."""
    family = ZOO[name]
    dense, model = family.model().to(torch.bfloat16), family.model().to(torch.bfloat16)
    report = sparsekern.prune(model, "wanda", "2:4", calibration=family.samples(), progress=False)
    check_decisions(family, dense, model, {layer.name for layer in report.layers}, family.samples())
