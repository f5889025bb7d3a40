"""Feed-forward networks in the pipeline: found in every family, solved together, resumed, refused by name."""

import copy

import pytest
import torch

import sparsekern
from sparsekern import Magnitude, SparseLLM
from sparsekern.models import find_blocks, find_feed_forwards, find_linears
from sparsekern.pruning.batches import Batch
from sparsekern.pruning.blockwise import feed_forward
from sparsekern.pruning.blockwise.feed_forward import MappedRows, networks_of
from sparsekern.pruning.plan import make_plan
from tests.models.families import tiny_ids, tiny_model

QUIET = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*never active in calibration")  # ReLU, with random weights
FORMS = {
    "llama": ("silu", True),
    "qwen2": ("silu", True),
    "gemma": ("gelu_tanh", True),
    "opt": ("relu", False),
    "gpt2": ("gelu_tanh", False),
    "gpt_neox": ("gelu", False),
}


def found(model):
    plan = make_plan(model, 0.5, None, None, None)
    with torch.no_grad():
        return networks_of(model, plan, Batch({"input_ids": tiny_ids()}, 0, None), SparseLLM())


@pytest.mark.parametrize("family", FORMS)
def test_networks_are_found_by_what_they_compute(family):
    activation, gated = FORMS[family]
    model = tiny_model(family)
    if activation != "relu":  # far enough from zero to tell the activations apart
        for parameter in model.parameters():
            parameter.data.mul_(4 if parameter.dim() == 2 else 1)
    for index, network in enumerate(found(model)):
        names = [linear.name for linear in network.linears]
        assert all(f".{index}." in name for name in names)
        assert (network.activation, network.gate is not None) == (activation, gated)
        if gated:
            assert [name.split(".")[-1] for name in names] == ["up_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize("attention", ["dense", "pruned"])
@pytest.mark.parametrize("family", FORMS)
def test_every_form_is_pruned_together_and_better(family, attention):
    model = tiny_model(family)
    report = sparsekern.prune(model, SparseLLM(attention=attention, iterations=3), 0.7, tiny_ids(16, 32), **QUIET)
    together = [layer for layer in report.layers if layer.output_error is not None]
    assert len(together) == 3 and all(layer.output_error < layer.output_error_alone < 1 for layer in together)
    assert report.sparsity == pytest.approx(0.7, abs=0.01)
    linears = {linear.name: linear for linear in find_linears(model)}
    for layer in report.layers:
        assert layer.zeros == int((linears[layer.name].weight == 0).sum()) and layer.error > 0
    assert "3 feed-forward networks, mean output error" in str(report)
    assert report.to_dict()["layers"][-1]["output_error"] == together[-1].output_error


@pytest.mark.parametrize("attention", ["dense", "pruned"])
def test_attention_is_the_solver_s_and_output_error_that_of_the_model(attention):
    dense, ids = tiny_model("llama"), tiny_ids()
    model = copy.deepcopy(dense)
    report = sparsekern.prune(model, SparseLLM(attention=attention), "2:4", ids, **QUIET)
    alone = copy.deepcopy(dense)
    sparsekern.prune(alone, "sparsegpt", "2:4", ids, **QUIET)
    first = [m.model.layers[0] for m in (model, alone)]
    assert torch.equal(*(block.self_attn.o_proj.weight for block in first))
    seen = []
    source = dense if attention == "dense" else model
    source.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        source(ids)
        y, got = (m.model.layers[0].mlp(seen[0]) for m in (dense, model))
    error = next(layer.output_error for layer in report.layers if layer.output_error is not None)
    assert error == pytest.approx(float((got - y).square().sum() / y.square().sum()), rel=1e-3)


def test_padding_changes_nothing():
    ids = tiny_ids(8, 16)
    padded = torch.cat((torch.zeros(8, 12, dtype=torch.long), ids), 1)
    mask = (torch.arange(28) >= 12).long().expand(8, 28)  # more than a probe looks at
    results = []
    for calibration in (ids, {"input_ids": padded, "attention_mask": mask}):
        model = tiny_model("llama")
        report = sparsekern.prune(model, SparseLLM(iterations=2), 0.5, calibration, **QUIET)
        results.append([layer.output_error for layer in report.layers if layer.output_error is not None])
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_tiles_and_batches_are_a_matter_of_memory_only(monkeypatch):
    reports, plain = [], MappedRows.read
    for tile, batch_size in ((2048, 8), (50, 3)):
        monkeypatch.setattr(feed_forward, "TILE", tile)
        read = []
        monkeypatch.setattr(MappedRows, "read", lambda self, rows, read=read: read.append(rows) or plain(self, rows))
        reports.append(sparsekern.prune(tiny_model("llama"), "sparsellm", 0.6, tiny_ids(), batch_size=batch_size, **QUIET))
        assert max(rows.stop - rows.start for rows in read) == min(tile, 128)  # whatever the number of tokens
    for few, many in zip(*(report.layers for report in reports), strict=True):
        assert many.output_error == (few.output_error and pytest.approx(few.output_error, rel=0.05))


def test_resumes_bit_for_bit(tmp_path, monkeypatch):
    ids, method = tiny_ids(), SparseLLM(attention="pruned", iterations=2)
    whole = tiny_model("opt")
    expected = sparsekern.prune(whole, method, 0.6, ids, **QUIET)
    plain, calls = SparseLLM.solve_feed_forward, []

    def fails_at_the_third(self, problem):
        calls.append(problem)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return plain(self, problem)

    model = tiny_model("opt")
    dense = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(SparseLLM, "solve_feed_forward", fails_at_the_third)
        with pytest.raises(RuntimeError, match="power cut"):
            sparsekern.prune(model, method, 0.6, ids, out=tmp_path / "out", **QUIET)
    last = [m.model.decoder.layers[2].state_dict() for m in (model, dense)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])  # the block at hand is as it was
    resumed = tiny_model("opt")
    report = sparsekern.prune(resumed, method, 0.6, ids, out=tmp_path / "out", resume=True, **QUIET)
    assert report.resumed_blocks == 2
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert [layer.output_error for layer in report.layers] == [layer.output_error for layer in expected.layers]


def test_half_precision_model():
    model = tiny_model("llama", torch.bfloat16)
    report = sparsekern.prune(model, SparseLLM(iterations=2), "2:4", tiny_ids(), **QUIET)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(layer.output_error <= layer.output_error_alone for layer in report.layers if layer.output_error is not None)


def test_a_solver_that_decides_over_all_linears_still_does():
    zeros = []
    for method in (SparseLLM(solver=Magnitude(scope="global"), iterations=2), Magnitude(scope="global")):
        report = sparsekern.prune(tiny_model("llama"), method, 0.5, tiny_ids(), **QUIET)
        zeros.append([layer.zeros for layer in report.layers])
    assert zeros[0] == zeros[1] and len(set(zeros[0])) > 3


def test_a_network_left_dense_is_left_alone():
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    report = sparsekern.prune(model, "sparsellm", 0.5, tiny_ids(), include="*self_attn*", **QUIET)
    assert {layer.output_error for layer in report.layers} == {None} and len(report.layers) == 12
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


def test_networks_alone_and_some_blocks_only():
    model = tiny_model("llama")
    include = ["model.layers.1.mlp.*", "model.layers.2.*"]
    report = sparsekern.prune(model, SparseLLM(attention="pruned", iterations=2), 0.5, tiny_ids(), include=include, **QUIET)
    assert len(report.layers) == 10 and sum(layer.output_error is not None for layer in report.layers) == 2


def test_a_part_of_a_network_is_refused():
    message = (
        "include, exclude, patterns: SparseLLM prunes .*up_proj, .*gate_proj, .*down_proj together, but .*gate_proj is left out"
    )
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(tiny_model("llama"), "sparsellm", 0.5, tiny_ids(), exclude="*gate_proj", **QUIET)


def test_another_architecture_is_refused_by_name(tmp_path):
    message = r"model.layers.0: SparseLLM needs one feed-forward network a block, .* found none in Phi3DecoderLayer"
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(tiny_model("phi3"), "sparsellm", 0.5, tiny_ids(), out=tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_no_calibration():
    with pytest.raises(ValueError, match="calibration: expected token ids, which SparseLLM needs"):
        sparsekern.prune(tiny_model("llama"), "sparsellm", 0.5, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_kept_outside_memory(dtype):
    rows = MappedRows(10, 3, dtype, torch.device("cpu"))
    values = torch.randn(4, 3)
    rows.write(slice(2, 6), values)
    assert rows.read(slice(2, 6)).dtype == torch.float32
    assert torch.equal(rows.read(slice(2, 6)), values.to(dtype).float())


def test_a_full_disk_is_an_error_before_any_row_is_written(monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feed_forward.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="needs 240 bytes for the activations of one block"):
        MappedRows(10, 6, torch.float32, torch.device("cpu"))


def test_nothing_is_found_where_nothing_fits():
    model = tiny_model("llama")
    assert find_feed_forwards({}) == []
    block = find_blocks(model).modules[0]
    calls = {}
    for linear in find_linears(block):
        x = torch.randn(5, linear.features)
        calls[linear] = sparsekern.models.LinearCall(x, x @ linear.weight.T)
    assert find_feed_forwards(calls) == []
