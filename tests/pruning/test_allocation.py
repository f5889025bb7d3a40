"""Shares of zeros by linear before a run: gradients and curves against plain ones, an exact budget, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.models import find_linears
from sparsekern.pruning import allocation
from sparsekern.pruning.batches import as_batches
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_experts import tiny_mixture

from .unfinished import QUIET, Interrupted, interrupted_run, run

pytestmark = pytest.mark.filterwarnings("ignore:.*(calibration tokens for|router gates):sparsekern.SparsekernWarning")


def test_squares_are_those_of_the_gradients_at_labels_that_the_model_draws(monkeypatch):
    model, ids = tiny_model("llama"), tiny_ids(3, 8)
    linears = [linear for linear in find_linears(model.model.layers[1], "model.layers.1") if "o_proj" in linear.name]
    drawn = []

    def least_likely(probabilities, count, generator):
        drawn.append(probabilities)
        return probabilities.argmin(1, keepdim=True)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "multinomial", least_likely)
        found = allocation.gradient_squares(model, linears, as_batches(ids, 2, ids.device, None), 0)[linears[0].name]
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


def test_gradients_leave_the_model_as_it_was():
    model, ids = tiny_model("llama"), tiny_ids(2, 16)
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    linears = find_linears(model.model.layers[0], "model.layers.0")
    with torch.no_grad():
        allocation.gradient_squares(model, linears, as_batches(ids, 2, ids.device, None), 0)
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


def test_padding_has_no_gradient():
    ids = tiny_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    model = tiny_model("llama")
    linears = find_linears(model.model.layers[0], "model.layers.0")
    with torch.no_grad():
        padded = allocation.gradient_squares(
            model, linears, as_batches([{"input_ids": ids, "attention_mask": mask}], 2, ids.device, None), 0
        )
        plain = allocation.gradient_squares(model, linears, as_batches(ids[:, :12], 2, ids.device, None), 0)
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
            "allocation: expected one of 'uniform', 'fisher', got 'best'",
        ),
        (
            lambda: tiny_model("llama"),
            "wanda",
            "2:4",
            {},
            "allocation: expected 'uniform' for pattern 2:4, which is no share of zeros",
        ),
        (
            lambda: tiny_model("llama"),
            "structured",
            0.5,
            {},
            "allocation: expected 'uniform' for Structured, which does not prune each",
        ),
        (lambda: tiny_model("llama"), "gradual", 0.5, {}, "allocation: expected 'uniform' for Gradual"),
        (lambda: tiny_model("llama"), "wanda", 0.5, {"leaves": 2}, "allocation: expected 'uniform' for sums in 2 parts"),
        (lambda: tiny_mixture("mixtral"), "wanda", 0.5, {}, "allocation: expected 'uniform' for a mixture"),
        (NoLogits, "wanda", 0.5, {}, "allocation: expected a model that returns the logits of each token, got NoLogits"),
    ],
)
def test_what_cannot_be_allocated_is_refused(make, method, pattern, options, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, method, pattern, tiny_ids(), **{"allocation": "fisher", **options}, **QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
