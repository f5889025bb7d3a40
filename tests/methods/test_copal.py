from __future__ import annotations

import math

import pytest
import torch

import sparsekern
from sparsekern import COPAL, NM, Unstructured
from sparsekern.methods.statistics import FeatureNorm, GramImportance, SampleImportance
from tests.tiny import llama

FORMS = pytest.mark.parametrize("form", ["sample", "gram"])


def statistics(layer, form):
    if form == "gram":
        return GramImportance(layer.weight, layer.statistics())
    norm = FeatureNorm(layer.x.shape[1], layer.x.device)
    found = SampleImportance(layer.weight, norm)
    for part in layer.x.split(70):
        norm.add(part, None)
        found.add(part, None)
    return found


def exact(layer, form) -> torch.Tensor:
    weight, x = layer.weight.double(), layer.x.double()
    if form == "gram":
        return (weight * (weight @ x.T @ x)).abs()
    return sum((weight * torch.outer(weight @ token, token)).abs() for token in x)


@FORMS
def test_importance_is_the_formula(layer, form):
    found = statistics(layer, form).importance
    assert found.dtype == torch.float32
    assert (found - exact(layer, form)).abs().max() <= 1e-5 * exact(layer, form).max()


@FORMS
@pytest.mark.parametrize("perturbation", [1e-3, 0.5])
def test_finite_differences_of_a_linear_layer_are_the_exact_form(layer, form, perturbation):
    config = COPAL(form=form, perturbation=perturbation)
    found = config.general_importance(lambda x, weight: x @ weight.T, layer.weight.double(), layer.x.double())
    torch.testing.assert_close(found, exact(layer, form), rtol=1e-8, atol=1e-8 * float(exact(layer, form).max()))


@FORMS
def test_finite_differences_of_another_layer_go_to_their_limit(layer, form):
    weight, x = layer.weight.double() / 8, layer.x.double()
    found = COPAL(form=form, perturbation=1e-6).general_importance(lambda x, weight: (x @ weight.T).tanh(), weight, x)
    outputs = x @ weight.T
    # dy = 2 p (1 - tanh^2) y, and its gradient by dW takes another 1 - tanh^2.
    each = weight * ((1 - outputs.tanh().square()).square() * outputs)[:, :, None] * x[:, None, :]
    expected = each.abs().sum(0) if form == "sample" else each.sum(0).abs()
    assert (found - expected).abs().max() <= 1e-4 * expected.max()


def test_a_chunk_of_tokens_at_a_time(layer, monkeypatch):
    def general() -> torch.Tensor:
        return COPAL().general_importance(lambda x, weight: x @ weight.T, layer.weight.double(), layer.x.double())

    whole = general()
    monkeypatch.setattr("sparsekern.methods.copal.GRADIENTS_AT_ONCE", 7 * layer.weight.numel())
    torch.testing.assert_close(general(), whole)


def test_gram_importance_splits_the_energy_of_a_row(layer):
    gram = layer.statistics()
    found = layer.weight * (layer.weight @ (gram.gram.tril() + gram.gram.tril(-1).T))
    torch.testing.assert_close(
        found.sum(1).double(), (layer.x.double() @ layer.weight.double().T).square().sum(0), rtol=1e-4, atol=1
    )
    torch.testing.assert_close(found.abs(), GramImportance(layer.weight, gram).importance, rtol=1e-4, atol=1e-2)


@FORMS
def test_importance_adds_up_over_datasets(layer, form):
    first, second = statistics(layer, form), statistics(layer, form)
    assert torch.equal(second.total, second.importance)
    second.include(first.total)
    assert torch.equal(second.importance, 2 * first.importance) and second.tokens == first.tokens == len(layer.x)


def test_new_tokens_change_the_importance_of_a_gram_matrix(layer):
    gram = layer.statistics()
    found = GramImportance(layer.weight, gram)
    before = found.importance
    gram.add(layer.x, None)
    found.add(layer.x, None)
    torch.testing.assert_close(found.importance, 2 * before)


@FORMS
def test_masks(layer, form):
    scores = exact(layer, form)
    rows = COPAL(form=form).solve(layer.weight, statistics(layer, form), Unstructured(0.5))
    assert ((rows.weight != 0).sum(1) == 32).all()
    matrix = COPAL(form=form, scope="matrix").solve(layer.weight, statistics(layer, form), Unstructured(0.5))
    assert int((matrix.weight != 0).sum()) == 12 * 64 and not ((matrix.weight != 0).sum(1) == 32).all()
    assert scores[matrix.weight != 0].min() >= 0.999 * scores[matrix.weight == 0].max()
    for pattern in (NM(2, 4), NM(4, 8)):
        solution = COPAL(form=form).solve(layer.weight, statistics(layer, form), pattern)
        kept, groups = (solution.weight != 0).unflatten(1, (-1, pattern.m)), scores.unflatten(1, (-1, pattern.m))
        assert (kept.sum(2) == pattern.n).all()
        lowest_kept = groups.masked_fill(~kept, math.inf).amin(2)
        assert (lowest_kept >= 0.999 * groups.masked_fill(kept, -math.inf).amax(2)).all()
        assert torch.equal(solution.weight, torch.where(solution.weight != 0, layer.weight, 0))


@FORMS
@pytest.mark.parametrize("report_error", [False, True])
def test_prunes_a_model(form, report_error):
    ids = torch.randint(320, (4, 32))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(32) < 29).expand(4, 32)}
    model = llama()
    report = sparsekern.prune(model, COPAL(form=form), "2:4", [batch], progress=False, report_error=report_error)
    assert report.sparsity == pytest.approx(0.5)
    assert all((layer.error is not None) == (report_error or form == "gram") for layer in report.layers)
    # What is padding leaves no trace.
    ids[:, 29:] = 7
    again = llama()
    sparsekern.prune(again, COPAL(form=form), "2:4", [batch], progress=False, report_error=report_error)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_padding_only_is_refused():
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "attention_mask": torch.zeros(1, 8, dtype=torch.int64)}
    with pytest.raises(ValueError, match="calibration: expected at least one token, got none"):
        sparsekern.prune(llama(), "copal", calibration=[batch], progress=False)


def test_outputs_that_overflow_name_their_linear():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 3e38
    with pytest.raises(ValueError, match="model.layers.1.self_attn.q_proj: x: expected finite outputs, but output 3 of row"):
        sparsekern.prune(model, "copal", 0.5, torch.randint(320, (2, 16)), progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "token"}, "COPAL.form: expected one of 'sample', 'gram', got 'token'"),
        ({"scope": "block"}, "COPAL.scope: expected one of 'row', 'matrix', got 'block'"),
        ({"perturbation": 0.0}, "COPAL.perturbation: expected a number above 0, got 0.0"),
        ({"perturbation": math.inf}, "COPAL.perturbation: expected a number above 0, got inf"),
        ({"perturbation": True}, "COPAL.perturbation: expected a number above 0, got True"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        COPAL(**settings)
