"""Shares of zeros by linear before a run: gradients and curves against plain ones, an exact budget, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.models import find_linears
from sparsekern.models.streaming import Stream, stream_of
from sparsekern.pruning import allocation, gradient_squares
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.blockwise import loop
from sparsekern.pruning.blockwise.shelf import Shelf
from sparsekern.pruning.quality import PRESETS, Preset
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_experts import tiny_mixture
from tests.models.test_streaming import folder_of
from tests.models.zoo import ZOO

from .live_tensors import LiveTensors
from .test_listed_experts import listed
from .test_max_memory import least
from .test_streamed import equal, tensors_of
from .unfinished import QUIET, Interrupted, interrupted_run, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(calibration tokens? for|router gates|no calibration token):sparsekern.SparsekernWarning"
)


def test_squares_are_those_of_the_gradients_at_labels_that_the_model_draws(monkeypatch):
    model, ids = tiny_model("llama"), tiny_ids(3, 8)
    linears = [linear for linear in find_linears(model.model.layers[1], "model.layers.1") if "o_proj" in linear.name]
    drawn = []

    def least_likely(probabilities, count, generator):
        drawn.append(probabilities)
        return probabilities.argmin(1, keepdim=True)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "multinomial", least_likely)
        found = gradient_squares.gradient_squares(model, linears, as_batches(ids, 2, ids.device, None), 0)[linears[0].name]
    expected = torch.zeros(32, dtype=torch.float64)
    for sample, probabilities in zip(ids, drawn, strict=True):
        outputs = []
        hook = linears[0].modules[0].register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        logits = model(sample[None]).logits[0]
        hook.remove()
        torch.testing.assert_close(probabilities, logits.softmax(1))
        loss = -logits.log_softmax(1).gather(1, probabilities.argmin(1, keepdim=True)).sum()
        (gradient,) = torch.autograd.grad(loss, outputs[0])
        expected += gradient[0].double().square().sum(0)
    torch.testing.assert_close(found, expected / ids.numel(), rtol=1e-4, atol=0)


def test_a_model_without_gradients_keeps_the_shares():
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    report = sparsekern.prune(model, "wanda", 0.5, tiny_ids(), allocation="fisher", **QUIET)
    assert {layer.sparsity for layer in report.layers} == {0.5}


def test_gradients_leave_the_model_as_it_was():
    model, ids = tiny_model("llama"), tiny_ids(2, 16)
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    linears = find_linears(model.model.layers[0], "model.layers.0")
    with torch.no_grad():
        gradient_squares.gradient_squares(model, linears, as_batches(ids, 2, ids.device, None), 0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "alps"])
def test_the_budget_holds_and_shares_differ(method):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(30)  # whose error now matters most
    report = sparsekern.prune(
        model,
        sparsekern.SparseGPT(scope="matrix") if method == "sparsegpt" else method,
        0.5,
        tiny_ids(),
        allocation="fisher",
        **QUIET,
    )
    uniform = sum(layer.shape[0] * layer.shape[1] // 2 for layer in report.layers)
    assert sum(layer.zeros for layer in report.layers) == uniform
    shares = {layer.name: layer.sparsity for layer in report.layers}
    assert all(0.349 <= share <= 0.651 for share in shares.values()) and len(set(shares.values())) > 3
    assert shares["model.layers.1.mlp.down_proj"] == min(shares.values())
    assert report.settings["allocation"] == "fisher"


def test_patterns_by_glob_keep_what_is_no_share_and_their_own_reach():
    model = tiny_model("llama")
    patterns = {"*.mlp.*": "2:4", "*.o_proj": 0.9}
    report = sparsekern.prune(model, "wanda", 0.5, tiny_ids(), patterns=patterns, allocation="fisher", **QUIET)
    for layer in report.layers:
        if ".mlp." in layer.name:
            assert layer.pattern == "2:4"
        elif "o_proj" in layer.name:
            assert 0.74 <= layer.sparsity <= 0.951


@pytest.mark.parametrize("make", [partial(tiny_model, "llama"), partial(tiny_mixture, "mixtral"), listed])
def test_mixed_patterns_keep_the_zeros_and_the_dear_linears(make):
    model = make()
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(30)  # whose error now matters most
    report = sparsekern.prune(model, "wanda", "4:8", tiny_ids(16, 12), allocation="mixed", **QUIET)
    patterns = {layer.name: layer.pattern for layer in report.layers}
    assert set(patterns.values()) == {"3:8", "4:8", "5:8"} and patterns["model.layers.1.self_attn.o_proj"] == "5:8"
    for layer in report.layers:
        assert layer.zeros * 8 == layer.shape[0] * layer.shape[1] * (8 - int(layer.pattern[0]))
    assert sum(layer.zeros * 2 - layer.shape[0] * layer.shape[1] for layer in report.layers) == 0
    assert report.settings["allocation"] == "mixed" and report.settings["patterns"] == patterns


@pytest.mark.parametrize("allocation", ["fisher", "mixed"])
def test_gradients_that_overflow_are_refused(allocation):
    model = tiny_model("llama").half()
    model.model.embed_tokens.weight.data.mul_(1e-3)
    model.model.norm.weight.data.mul_(1000)
    with pytest.raises(ValueError, match="allocation: expected finite gradients, got NaN or Inf at the outputs of model.layers"):
        sparsekern.prune(model, "wanda", 0.5 if allocation == "fisher" else "4:8", tiny_ids(), allocation=allocation, **QUIET)


def test_each_kind_of_pattern_keeps_its_own_zeros():
    model, patterns = tiny_model("llama"), {"*.mlp.gate_proj": "8:16", "*.mlp.*": "2:4", "*.o_proj": 0.7}
    report = sparsekern.prune(
        model, sparsekern.SparseGPT(scope="matrix"), 0.5, tiny_ids(), patterns=patterns, allocation="mixed", **QUIET
    )
    kinds = {}
    for layer in report.layers:
        kinds.setdefault(layer.pattern.partition(":")[2] or "share", []).append(layer)
    assert kinds.keys() == {"16", "4", "share"}
    for m in ("16", "4"):
        assert sum(layer.zeros for layer in kinds[m]) * 2 == sum(layer.shape[0] * layer.shape[1] for layer in kinds[m])
    assert 1 < len(found := {layer.pattern for layer in kinds["16"]}) and found <= {f"{n}:16" for n in range(6, 11)}
    size = {layer.name: layer.shape[0] * layer.shape[1] for layer in kinds["share"]}
    asked = sum(int(count * (0.7 if "o_proj" in name else 0.5)) for name, count in size.items())
    assert sum(layer.zeros for layer in kinds["share"]) == asked


def test_mixed_patterns_are_saved_packed_and_resumed(tmp_path, monkeypatch):
    options = {"allocation": "mixed", "method": "wanda", "patterns": {"*": "4:8"}, "format": "packed"}
    expected, report = run(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, **options)
    model, _ = run(tmp_path / "out", resume=True, **options)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    loaded = sparsekern.load(tmp_path / "out")
    formats = {layer.name: loaded.get_submodule(layer.name).format for layer in report.layers}
    assert all(formats[layer.name] in (layer.pattern, "bitmask") for layer in report.layers) and len(set(formats.values())) > 2
    unpacked = sparsekern.unpack(loaded).state_dict()
    assert all(torch.equal(value, unpacked[name]) for name, value in expected.state_dict().items())


def test_padding_has_no_gradient():
    ids = tiny_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    model = tiny_model("llama")
    linears = find_linears(model.model.layers[0], "model.layers.0")
    with torch.no_grad():
        padded = gradient_squares.gradient_squares(
            model, linears, as_batches([{"input_ids": ids, "attention_mask": mask}], 2, ids.device, None), 0
        )
        plain = gradient_squares.gradient_squares(model, linears, as_batches(ids[:, :12], 2, ids.device, None), 0)
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-3, atol=0)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    options = {"allocation": "fisher", "method": "wanda", "patterns": {"*": 0.5}}
    expected, _ = run(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, **options)
    model, report = run(tmp_path / "out", resume=True, **options)
    assert report.resumed_blocks == 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "pattern", "asked"),
    [("gpt2", 0.5, "fisher"), ("llama", 0.5, "fisher"), ("qwen3_moe", 0.5, "fisher"), ("llama", "4:8", "mixed")],
)
def test_a_streamed_model_gets_the_shares_of_one_in_memory(kind, pattern, asked, tmp_path, monkeypatch):
    """The bits are equal, and at most two blocks are in memory: the one that runs and the one that is read next, forward or backward."""
    folder, squares, held = folder_of(kind, tmp_path / "model"), [], []

    def kept(*arguments, **options):
        squares.append(gradient_squares.gradient_squares(*arguments, **options))
        return squares[-1]

    def counted(self, model, index, own=Stream._read):
        own(self, model, index)
        held.append(len(self._ahead) + sum(not next(model.get_submodule(name).parameters()).is_meta for name in self.blocks))

    monkeypatch.setattr(allocation, "gradient_squares", kept)
    monkeypatch.setattr(Stream, "_read", counted)
    ids, mask = tiny_ids(6, 20), torch.ones(6, 20, dtype=torch.int64)
    mask[1, 13:] = 0
    batches = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(3), slice(3, 6))]
    models = [sparsekern.load(folder, device="cpu", stream=stream) for stream in (False, True)]
    for model in models:
        sparsekern.prune(model, "wanda", pattern, batches, allocation=asked, out=tmp_path / f"{id(model)}", **QUIET)
    whole, streamed = squares
    assert len(whole) > 10 and all(torch.equal(value, streamed[name]) for name, value in whole.items())
    assert all(parameter.requires_grad for parameter in models[1].parameters())
    assert equal(*(tensors_of(tmp_path / f"{id(model)}") for model in models))
    assert max(held) <= 2


def test_the_inputs_of_blocks_that_exceed_the_memory_are_on_disk(tmp_path, monkeypatch):
    folder, written = folder_of("llama_tied", tmp_path / "model"), []

    def counted(self, key, tensor, own=Shelf._write):
        written.append(key)
        own(self, key, tensor)

    monkeypatch.setattr(Shelf, "_write", counted)

    def run(out, limit):
        model = sparsekern.load(folder, device="cpu", stream=True)
        options = {"allocation": "fisher", "out": tmp_path / out, "batch_size": 4, "max_memory": limit}
        return sparsekern.prune(model, "wanda", 0.5, tiny_ids(16, 48), **options, **QUIET)

    run("whole", None)
    limit, message = least(lambda limit: run("never", limit))
    limit, message = least(lambda _: run("never", limit))  # enough for the model, not for the run
    assert "the gradients of a block" not in message
    limit, message = least(lambda _: run("never", limit))  # enough for the run, not for its gradients
    assert "the gradients of a block" in message and "the logits of a sample" in message and not written
    run("limited", limit)
    assert len({key for key in written if isinstance(key, tuple)}) > 16  # block and sample, of 48
    assert equal(tensors_of(tmp_path / "limited"), tensors_of(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_moe"])
def test_the_tensors_of_the_gradients_fit_into_what_is_counted(kind, tmp_path, monkeypatch):
    """By the token, since blocks that are read are counted elsewhere. No more is counted than four times as much."""
    needs, most, count, own = [], [], allocation.room_beside, gradient_squares._of_one_block_after_another

    def told(model, limit, found=None):
        needs.append(sum(found.values()))
        count(model, limit, found)
        return 0  # so that hidden states go to the disk

    def watched(*arguments):
        with LiveTensors() as live:
            squares = own(*arguments)
        most.append(live.most)
        return squares

    monkeypatch.setattr(allocation, "room_beside", told)
    monkeypatch.setattr(gradient_squares, "_of_one_block_after_another", watched)
    for length in (16, 48):
        for module in (allocation, gradient_squares):
            monkeypatch.setattr(module, "LENGTH", length)
        model = sparsekern.load(folder_of(kind, tmp_path / f"model {length}"), device="cpu", stream=True)
        options = {"allocation": "fisher", "max_memory": "8GB", "batch_size": 1, "out": tmp_path / f"out {length}"}
        sparsekern.prune(model, "wanda", 0.5, tiny_ids(4, length), **options, **QUIET)
    taken, counted = most[1] - most[0], needs[1] - needs[0]
    assert taken < counted < 4 * taken


def test_a_streamed_model_whose_blocks_form_no_chain_is_refused_or_goes_without(tmp_path, monkeypatch):
    ZOO["mpt"].model().save_pretrained(tmp_path / "model")
    model, why = sparsekern.load(tmp_path / "model", device="cpu", stream=True), "for a streamed model whose blocks take more than"
    options = {"calibration": tiny_ids(4, 12), "pattern": 0.5, "out": tmp_path / "out", **QUIET}
    with pytest.raises(ValueError, match=f"allocation: expected 'uniform' {why}"):
        sparsekern.prune(model, "magnitude", allocation="fisher", **options)
    assert stream_of(model) is not None and not (tmp_path / "out").exists()
    monkeypatch.setitem(PRESETS, "best", Preset("magnitude", allocation="fisher"))
    with pytest.warns(
        sparsekern.SparsekernWarning, match=f"^quality: 'best' leaves out allocation {why} the output of the one before$"
    ):
        report = sparsekern.prune(model, quality="best", **options)
    assert report.sparsity == 0.5 and "allocation" not in report.settings


class NoLogits(nn.Module):
    """A decoder without its head."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model("llama").model
        self.config = self.model.config

    def forward(self, input_ids, use_cache=False):
        return self.model(input_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("make", "method", "pattern", "options", "message"),
    [
        (
            lambda: tiny_model("llama"),
            "wanda",
            0.5,
            {"allocation": "best"},
            "allocation: expected one of 'uniform', 'fisher', 'mixed', got 'best'",
        ),
        (
            lambda: tiny_model("llama"),
            "wanda",
            "2:4",
            {},
            "allocation: expected 'uniform' for pattern 2:4, which is no share of zeros, or 'mixed', which gives each linear an N of its own",
        ),
        (
            lambda: tiny_model("llama"),
            "sparsegpt",
            "2:4",
            {"allocation": "mixed", "values": "int4"},
            "values: expected None for allocation='mixed', which chooses patterns that 4 bits have no format for, got 'int4'",
        ),
        (
            lambda: tiny_model("llama"),
            "structured",
            0.5,
            {},
            "allocation: expected 'uniform' for Structured, which does not prune each",
        ),
        (lambda: tiny_model("llama"), "gradual", 0.5, {}, "allocation: expected 'uniform' for Gradual"),
        (
            lambda: tiny_model("llama"),
            "wanda",
            "1:4",
            {"allocation": "mixed"},
            "allocation: expected 'uniform' for pattern 1:4, to which no N on its other side exists, got 'mixed'",
        ),
        (
            lambda: tiny_model("llama"),
            "wanda",
            "2:4",
            {"allocation": "mixed", "include": ["lm_head"]},
            "allocation: expected 'uniform' where no linear of a block is pruned, got 'mixed'",
        ),
        (
            lambda: tiny_model("llama"),
            "wanda",
            "2:4",
            {"allocation": "mixed", "format": "2:4"},
            "format: expected 'packed', 'bitmask' or 'dense' for allocation='mixed', got '2:4'",
        ),
        (NoLogits, "wanda", 0.5, {}, "allocation: expected a model that returns the logits of each token, got NoLogits"),
    ],
)
def test_what_cannot_be_allocated_is_refused(make, method, pattern, options, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, method, pattern, tiny_ids(), **{"allocation": "fisher", **options}, **QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_a_run_refuses_or_leaves_out_is_said_in_front_of_the_work(tmp_path, monkeypatch):
    def worked(*args):
        raise Interrupted

    monkeypatch.setattr(loop, "with_allocation", worked)
    monkeypatch.setitem(PRESETS, "best", Preset("wanda", allocation="fisher", distill=sparsekern.Distill(steps=1)))
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    options = {"quality": "best", "pattern": 0.5, "calibration": tiny_ids(8, 12), "out": tmp_path / "out", **QUIET}
    with (
        pytest.raises(Interrupted),
        pytest.warns(sparsekern.SparsekernWarning, match="'best' leaves out distill for a streamed model"),
    ):
        sparsekern.prune(model, **options)
    enough_for_the_model, _ = least(lambda limit: sparsekern.prune(model, **options, max_memory=limit))
    with pytest.warns(sparsekern.SparsekernWarning):
        least(lambda _: sparsekern.prune(model, **options, max_memory=enough_for_the_model))
