"""Runs of streamed models: the same files and bits as those of a model in memory, however often they are killed."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sparsekern
from sparsekern.models.streaming import stream_of
from tests.models.families import tiny_ids
from tests.models.test_streaming import KINDS, folder_of, in_blocks

METHODS = {
    "magnitude": sparsekern.Magnitude(),
    "random": sparsekern.Random(),
    "wanda": sparsekern.Wanda(),
    "sparsegpt": sparsekern.SparseGPT(),
    "alps": sparsekern.ALPS(),
    "copal": sparsekern.COPAL(),
    "sparsellm": sparsekern.SparseLLM(),
}


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def pruned(folder, out, method="wanda", *, stream, **options):
    model = sparsekern.load(folder, device="cpu", stream=stream)
    return model, sparsekern.prune(model, METHODS[method], "2:4", tiny_ids(), out=out, progress=False, **options)


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("kind", "method"), [(kind, "sparsegpt") for kind in KINDS] + [("llama", method) for method in METHODS])
def test_a_streamed_run_makes_the_bits_of_one_in_memory(kind, method, tmp_path):
    folder = folder_of(kind, tmp_path / "model", "20KB")
    whole, first = pruned(folder, tmp_path / "whole", method, stream=False)
    model, second = pruned(folder, tmp_path / "streamed", method, stream=True)
    assert equal(tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole"))
    without = [[{**vars(layer), "seconds": 0} for layer in report.layers] for report in (first, second)]
    assert without[0] == without[1] and len(second.layers) == len(first.layers) > 0
    assert all(parameter.is_meta for parameter in in_blocks(model))
    assert not (tmp_path / "streamed" / "checkpoint").exists()
    loaded = sparsekern.load(tmp_path / "streamed", device="cpu")
    with torch.no_grad():
        expected = whole(tiny_ids()).logits
        assert torch.equal(loaded(tiny_ids()).logits, expected) and torch.equal(model(tiny_ids()).logits, expected)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_run_goes_on(stop, tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    pruned(folder, tmp_path / "whole", stream=True)

    class Killed(BaseException):
        pass

    solve, calls = sparsekern.Wanda.solve, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == stop * 7 + 3:
            raise Killed
        return solve(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(sparsekern.Wanda, "solve", killed)
        pruned(folder, tmp_path / "out", stream=True)
    assert len(list((tmp_path / "out" / "checkpoint").glob("*.safetensors"))) == stop
    with pytest.raises(ValueError, match="holds an unfinished run"):
        pruned(folder, tmp_path / "out", stream=True)
    _, report = pruned(folder, tmp_path / "out", stream=True, resume=True)
    assert report.resumed_blocks == stop
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_a_head_outside_the_blocks_is_pruned_too(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    options = {"include": ["*", "lm_head"]}
    pruned(folder, tmp_path / "whole", stream=False, **options)
    pruned(folder, tmp_path / "streamed", stream=True, **options)
    found = tensors_of(tmp_path / "streamed")
    assert equal(found, tensors_of(tmp_path / "whole"))
    assert (found["lm_head.weight"] == 0).float().mean() == 0.5


def test_what_is_not_pruned_is_copied_byte_for_byte(tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    before = tensors_of(folder)
    pruned(folder, tmp_path / "out", stream=True, include="*.1.mlp.*")
    after = tensors_of(tmp_path / "out")
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert after.keys() == before.keys() and sorted(changed) == [
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()


def test_only_what_works_block_by_block_takes_a_streamed_model(tmp_path):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    with pytest.raises(ValueError, match="method: expected one that works block by block for a streamed model, got Structured"):
        sparsekern.prune(model, "structured", 0.5, out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="method: expected one that works block by block for a streamed model, got Gradual"):
        sparsekern.prune(model, "gradual", 0.5, tiny_ids(), out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="out: expected a folder, which holds the pruned blocks of a streamed model; got None"):
        sparsekern.prune(model, "magnitude", progress=False)
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_found_when_its_block_is_read(tmp_path):
    model = KINDS["llama"]()
    model.model.layers[1].self_attn.q_proj.weight.data[3, 2] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: expected finite weights, got nan at \[3, 2\]"):
        pruned(tmp_path / "model", tmp_path / "out", "magnitude", stream=True)
    assert len(list((tmp_path / "out" / "checkpoint").glob("*.safetensors"))) == 1


def test_the_model_reads_from_its_output_afterwards(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    model, _ = pruned(folder, tmp_path / "out", stream=True)
    assert {stored.path.parent for stored in stream_of(model).stored.values()} == {tmp_path / "out"}


@pytest.mark.parametrize(
    "call",
    [
        lambda model: sparsekern.moefy(model, experts=4, top_k=2, calibration=tiny_ids()),
        sparsekern.keep_sparsity,
        sparsekern.pack,
    ],
    ids=["moefy", "keep_sparsity", "pack"],
)
def test_what_needs_the_weights_in_memory_says_so(call, tmp_path):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    with pytest.raises(ValueError, match="model: expected one in memory, got a streamed one, .* load it without stream=True"):
        call(model)
