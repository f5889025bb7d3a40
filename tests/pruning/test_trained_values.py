"""`values="int4"` with `tune` and `distill`: rounded weights are trained, and stay on their grid."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sparsekern
from sparsekern import BlockTuning, Distill
from sparsekern.layouts.q4_grid import grid_scales
from tests.models.families import tiny_ids, tiny_model

from .test_distill import held_out_divergence, same, stopped_after
from .unfinished import QUIET, Interrupted, run

TUNE = BlockTuning(passes=3, batch_tokens=32, learning_rate=1e-3)
DISTILL = Distill(steps=6, batch_tokens=64, learning_rate=3e-4)


DAMAGES = [
    ("scales", lambda scales: scales[:, :0], r" of shape \(48, 1\)\)"),
    ("scales", lambda scales: scales.fill_(float("nan")), " holds NaN or Inf"),
    ("master", lambda master: None, r" of shape \(48, 32\)\)"),
    ("master", lambda master: master.fill_(float("inf")), " holds NaN or Inf"),
    ("exp_avg", lambda moments: None, r" of shape \(48, 32\)\)"),
    ("exp_avg_sq", lambda moments: moments.fill_(float("nan")), " holds NaN or Inf"),
]


def change_tensor(path, name, change):
    """Change a tensor of a file, or remove it where `change` returns None."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[name] = change(tensors[name])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, metadata)


def ids():
    return tiny_ids(24, 16)


def prune(model=None, **arguments):
    model = tiny_model("llama") if model is None else model
    return model, sparsekern.prune(model, "sparsegpt", "2:4", ids(), values="int4", **QUIET, **arguments)


def linears(model) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if ".layers." in name and value.dim() == 2}


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
def test_tuned_blocks_of_a_half_model_come_closer_on_their_grid():
    tuned, report = prune(tiny_model("llama").bfloat16(), tune=TUNE)
    plain, _ = prune(tiny_model("llama").bfloat16())
    assert (
        all(row["after"] <= row["before"] for row in report.tuning)
        and report.tuning[0]["after"] < 0.95 * report.tuning[0]["before"]
    )
    for name, weight in linears(tuned).items():
        assert grid_scales(weight) is not None, name
        assert (weight.view(len(weight), -1, 4) != 0).sum(-1).max() <= 2
        if "layers.0." in name:
            assert not weight[linears(plain)[name] == 0].any() and not torch.equal(weight, linears(plain)[name])
    packed = sparsekern.pack(tuned)
    assert packed.model.layers[1].mlp.up_proj.format == "2:4-q4"


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")
def test_the_distilled_model_comes_closer_on_its_grid_and_resumes(tmp_path, monkeypatch):
    model, report = prune(distill=DISTILL)
    curve = report.distillation
    assert curve[-1]["kl"] < curve[0]["kl"] and curve[-1]["kl"] == pytest.approx(held_out_divergence(model), rel=1e-3)
    assert all(grid_scales(weight) is not None for weight in linears(model).values())
    arguments = {"method": "sparsegpt", "ids": ids(), "distill": DISTILL, "values": "int4"}
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", **arguments)
    state = tmp_path / "out/checkpoint/distillation.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    for kind, change, message in DAMAGES:
        shutil.copytree(tmp_path / "out", tmp_path / "damaged")
        change_tensor(tmp_path / "damaged/checkpoint" / state.name, f"{kind}/{name}", change)
        with pytest.raises(ValueError, match=rf"{state.name}.*{kind}/{name}{message}; remove it to redo its part of the run"):
            run(tmp_path / "damaged", resume=True, **arguments)
        shutil.rmtree(tmp_path / "damaged")
    assert same(run(tmp_path / "out", resume=True, **arguments)[0], model)
