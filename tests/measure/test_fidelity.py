"""Divergence and agreement with the dense model against whole logits in float64; streamed, by few rows, and from the command line."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import sparsekern
from sparsekern.cli.main import main
from sparsekern.data import predictions
from sparsekern.measure import fidelity as module
from tests import encoders, tiny
from tests.models.families import tiny_ids, tiny_model

LENGTH = 16


def changed(model):
    """A copy of the model whose predictions differ."""
    other = copy.deepcopy(model)
    for name, value in other.named_parameters():
        if value.dim() == 2 and "layers" in name:
            value.data *= value.abs() > value.abs().median()
    return other


def textbook(model, dense, ids):
    """Divergence, agreement and both perplexities, in float64, from the whole logits of all windows."""
    windows = ids.flatten().view(-1, LENGTH)
    with torch.no_grad():
        own, other = (m(input_ids=windows).logits[:, :-1].double() for m in (model, dense))
    log_own, log_other = own.log_softmax(-1), other.log_softmax(-1)
    losses = [F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp() for logits in (own, other)]
    kl = (log_other.exp() * (log_other - log_own)).sum(-1).mean()
    return [float(value) for value in (kl, (own.argmax(-1) == other.argmax(-1)).double().mean(), *losses)]


def figures(found):
    return [found.divergence, found.agreement, found.perplexity, found.dense_perplexity]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])  # Gemma 2 bounds its logits: they are taken whole
def test_the_figures_are_those_of_whole_logits(family):
    dense, ids = tiny_model(family), tiny_ids(4, 2 * LENGTH)
    model = changed(dense)
    found = sparsekern.fidelity(model, dense, ids, LENGTH)
    assert figures(found) == pytest.approx(textbook(model, dense, ids), rel=1e-5, abs=2e-7)
    assert found.divergence > 1e-4 and 0 < found.agreement < 1
    assert found.perplexity == pytest.approx(sparsekern.perplexity(model, ids, LENGTH), rel=1e-6)
    back = sparsekern.fidelity(dense, model, ids, LENGTH)
    assert back.divergence != found.divergence and back.agreement == found.agreement


def test_a_model_is_as_close_as_can_be_to_itself():
    model = tiny_model("llama").train()
    found = sparsekern.fidelity(model, model, tiny_ids(2, LENGTH), LENGTH)
    assert (found.divergence, found.agreement) == (0.0, 1.0) and found.perplexity == found.dense_perplexity
    assert model.training and "divergence 0.0000 nats a token, same top token 100.00%, perplexity" in str(found)


def test_a_few_rows_of_logits_are_in_memory(monkeypatch):
    monkeypatch.setattr(predictions, "LOGIT_ROWS", 4)
    monkeypatch.setattr(module, "LOGIT_ROWS", 4)
    dense, ids, rows = tiny_model("llama"), tiny_ids(2, LENGTH), []
    model = changed(dense)
    for of in (model, dense):
        of.lm_head.register_forward_hook(lambda _, args, output: rows.append(output.numel() // output.shape[-1]))
    found = sparsekern.fidelity(model, dense, ids, LENGTH)
    assert max(rows) == 4 and figures(found) == pytest.approx(textbook(model, dense, ids), rel=1e-5, abs=2e-7)


@pytest.mark.parametrize("streamed", [(True, True), (True, False), (False, True)])
def test_streamed_models_give_the_same_figures(tmp_path, streamed):
    folders = tiny.save_folder(tmp_path / "dense"), tmp_path / "pruned"
    sparsekern.save(changed(sparsekern.load(folders[0])), folders[1])
    ids = torch.randint(320, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    dense, model = (sparsekern.load(folder) for folder in folders)
    expected = sparsekern.fidelity(model, dense, ids, LENGTH)
    models = [sparsekern.load(folder, stream=stream) for folder, stream in zip(reversed(folders), streamed, strict=True)]
    assert sparsekern.fidelity(*models, ids, LENGTH) == expected
    if all(streamed):
        with pytest.raises(ValueError, match="max_memory: expected at least") as found:
            sparsekern.fidelity(*models, ids, LENGTH, max_memory="1MB")
        for_one = str(found.value).partition("at least ")[2].partition(" MB")[0] + "MB"
        with pytest.raises(ValueError, match="max_memory: expected at least .* MB for two blocks, of the dense model"):
            sparsekern.fidelity(*models, ids, LENGTH, max_memory=for_one)
        assert sparsekern.fidelity(*models, ids, LENGTH, max_memory="8GB") == expected
    else:
        with pytest.raises(ValueError, match="max_memory: expected a streamed model, got one in memory"):
            sparsekern.fidelity(*models, ids, LENGTH, max_memory="8GB")


def test_a_limit_lets_fewer_windows_through_together(tmp_path, monkeypatch):
    """Any number of windows at once gives the same bits."""
    folder = tiny.save_folder(tmp_path / "dense")
    model, dense = (sparsekern.load(folder, stream=True) for _ in range(2))
    ids, sizes = torch.randint(320, (5, LENGTH), generator=torch.Generator().manual_seed(0)), []
    expected = sparsekern.fidelity(model, dense, ids, LENGTH)
    monkeypatch.setattr(module, "_together", lambda *_: 2)
    monkeypatch.setattr(module, "_compared", lambda m, d, w, own=module._compared: sizes.append(len(w)) or own(m, d, w))
    assert sparsekern.fidelity(model, dense, ids, LENGTH) == expected and sizes == [2, 2, 1]


@pytest.mark.parametrize("bad", ["model", "dense"])
def test_nan_is_named(bad):
    models = {"model": tiny_model("llama"), "dense": tiny_model("llama")}
    with torch.no_grad():
        models[bad].get_input_embeddings().weight[7] = math.nan
    ids = torch.full((3 * LENGTH,), 5)
    ids[LENGTH + 3] = 7
    with pytest.raises(ValueError, match="fidelity: the model's output for window 1 holds NaN or Inf"):
        sparsekern.fidelity(models["model"], models["dense"], ids, LENGTH)


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (lambda: tiny.llama(99), ValueError, "dense: expected a model of 320 tokens like the other one, got one of 99"),
        (lambda: encoders.tiny("bert"), TypeError, "dense: expected a causal language model, got BertModel"),
        (lambda: "gpt2", TypeError, "dense: expected a transformers model, got str"),
        (
            lambda: tiny.llama(max_position_embeddings=8),
            ValueError,
            "length: expected at most 8, the positions of this model, got 16",
        ),
    ],
)
def test_models_that_cannot_be_compared_are_refused(dense, error, message):
    with pytest.raises(error, match=message):
        sparsekern.fidelity(tiny.llama(), dense(), torch.zeros(4, LENGTH, dtype=torch.int64), LENGTH)


def test_the_command_line_records_it_in_report_page_and_card(tmp_path, capsys):
    dense, out, text = tiny.save_folder(tmp_path / "dense"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    model = sparsekern.load(dense)
    sparsekern.prune(model, "magnitude", "2:4", out=out, tokenizer=tiny.tokenizer(), progress=False)
    options = ["--text", str(text), "--length", "16", "--windows", "2"]
    assert main(["eval", str(out), "--against", str(dense), "--record", *options]) == 0
    found = sparsekern.fidelity(model, sparsekern.load(dense), str(text), 16, tokenizer=tiny.tokenizer())
    printed = capsys.readouterr().out
    measured = sparsekern.Report.from_json(out / "report.json").measured
    assert measured["perplexity, pruned"] > 1 and measured["perplexity, dense"] > 1
    assert f"divergence {measured['divergence from dense']:.4f} nats a token, same top token" in printed
    assert 0 <= measured["agreement with dense"] <= 1 and measured["divergence from dense"] > 0
    assert type(found.agreement) is float
    for name in ("report.html", "README.md"):
        page = (out / name).read_text()
        assert "divergence from dense" in page and "agreement with dense" in page
