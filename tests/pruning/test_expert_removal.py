"""Removal of experts by `prune`: scores against plain float64, one folder for two methods, resuming, and everything that is refused."""

import json

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern import ExpertPruning, ExpertReport
from sparsekern.pruning import checkpoint
from sparsekern.pruning.blockwise.shares import Share
from sparsekern.pruning.experts.scores import ExpertScores
from sparsekern.ranks import World
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_mixtures import dense

IDS = tiny_ids(6, 12)
MASK = (torch.arange(12) < torch.tensor([12, 9, 12, 5, 12, 12])[:, None]).long()
PADDED = [{"input_ids": IDS[rows], "attention_mask": MASK[rows]} for rows in (slice(0, 4), slice(4, 6))]
QUIET = {"progress": False, "calibration": IDS}


def removed(model, method=None, pattern=None, **options) -> ExpertReport:
    return sparsekern.prune(model, method or ExpertPruning(), pattern, **QUIET | options)


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def plain_scores(name: str, score: str, layer: int) -> list[float]:
    """The scores of a layer of the dense model in float64, token by token, without padding."""
    model = dense(name).double()
    model.set_experts_implementation("eager")  # the default one multiplies no float64
    calls = []
    experts = model.model.layers[layer].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    found: list[list[tuple[float, float]]] = [[] for _ in range(8)]
    for batch in PADDED:
        calls.clear()
        model(**batch)
        hidden, index, weights = calls[0]
        for token in batch["attention_mask"].flatten().nonzero()[:, 0].tolist():
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
                found[expert].append((weight, float(output.square().sum().sqrt())))
    formulas = {
        "reap": lambda pairs: sum(g * n for g, n in pairs) / max(len(pairs), 1),
        "man": lambda pairs: sum(n for _, n in pairs) / max(len(pairs), 1),
        "msan": lambda pairs: sum(n * n for _, n in pairs) / max(len(pairs), 1),
        "frequency": len,
        "activation": lambda pairs: sum(n for _, n in pairs),
    }
    return [float(formulas[score](pairs)) for pairs in found]


@pytest.mark.parametrize("score", ["reap", "man", "msan", "frequency", "activation"])
def test_scores_are_those_of_the_dense_model_in_float64(score):
    model = dense("mixtral")
    report = removed(model, ExpertPruning(score=score, remove=0.5), calibration=PADDED)
    assert report.calibration_tokens == int(MASK.sum())
    for number, layer in enumerate(report.layers):
        expected = plain_scores("mixtral", score, number)
        assert layer.scores == pytest.approx(expected, rel=1e-4)
        assert sum(layer.tokens) == 2 * int(MASK.sum())
        lowest = sorted((score, -expert) for expert, score in enumerate(expected))[:4]  # of equal scores the last
        assert layer.removed == sorted(-negative for _, negative in lowest)
        assert (layer.experts, layer.highest_removed <= layer.lowest_kept) == (8, True)


def test_scores_of_sigmoid_gates():
    report = removed(dense("glm4_moe"), calibration=PADDED)
    assert report.layers[0].scores == pytest.approx(plain_scores("glm4_moe", "reap", 1), rel=1e-4)
    first, second = ([e for e in report.layers[0].removed if e // 4 == group] for group in range(2))
    assert len(first) == len(second) == 1  # of each group


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "glm4_moe"])
def test_the_folder_is_an_ordinary_smaller_checkpoint(name, tmp_path):
    model = dense(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = removed(model, out=tmp_path / "out")
    loaded, loading = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()) and same(state(loaded), state(model))
    assert "sparsekern" not in (tmp_path / "out" / "config.json").read_text()
    assert report.experts == (8, 6)
    assert report.model_parameters == (parameters, sum(parameter.numel() for parameter in loaded.parameters()))
    assert sparsekern.Report.from_json(tmp_path / "out" / "report.json") == report
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Scores by layer" in page and "<polyline" in page


def test_the_weights_that_stay_are_unchanged():
    model, before = dense("mixtral"), state(dense("mixtral"))
    report = removed(model)
    for layer in report.layers:
        kept = [expert for expert in range(8) if expert not in layer.removed]
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(model.get_parameter(f"{layer.name}.{part}"), before[f"{layer.name}.{part}"][kept])
    others = {name for name in before if ".experts." not in name and ".gate." not in name}
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
def test_then_another_method_as_if_it_were_called_afterwards(tmp_path):
    together, apart = dense("mixtral"), dense("mixtral")
    method = sparsekern.SparseGPT(damping=0.02)
    report = removed(together, pattern="2:4", then=method, exclude="*.q_proj", out=tmp_path / "out")
    removed(apart)
    alone = sparsekern.prune(apart, method, "2:4", exclude="*.q_proj", **QUIET)
    assert same(state(together), state(apart))
    assert report.then.sparsity == 0.5
    assert [layer.name for layer in report.then.layers] == [layer.name for layer in alone.layers]
    assert "model.layers.1.mlp.experts.5.down_proj" in {layer.name for layer in report.then.layers}
    written = sparsekern.Report.from_json(tmp_path / "out" / "report.json")
    assert written == report and written.then.layers == report.then.layers
    assert report.summary().keys() > alone.summary().keys() and "2:4" in str(report)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Scores by layer" in page and "Error by layer, afterwards" in page and "experts.5.down_proj" in page


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "index", "resumed"), [("", 0, 1), ("then-", 0, 2), ("then-", 1, 2)])
def test_a_run_that_is_resumed_ends_the_same(stage, index, resumed, tmp_path, monkeypatch):
    whole, model = dense("mixtral"), dense("mixtral")
    options = {"pattern": "2:4", "then": "wanda", "progress": False}
    removed(whole, **options)

    def interrupted(self, number, result, save=checkpoint.Checkpoint.save):
        save(self, number, result)
        if (self.stage, number) == (stage, index):
            raise Interrupted

    before = state(model)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        removed(model, out=tmp_path / "out", **options)
    if not stage:
        assert same(state(model), before)  # experts are removed once all are scored
    model = dense("mixtral")
    report = removed(model, out=tmp_path / "out", resume=True, **options)
    assert same(state(model), state(whole))
    assert report.resumed_blocks == resumed
    assert report.then.resumed_blocks == (index + 1 if stage else 0)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_checkpoint_whose_sums_were_changed_is_refused(tmp_path, monkeypatch):
    def interrupted(self, number, result, save=checkpoint.Checkpoint.save):
        for tensor in result.weights.values():
            tensor.add_(tensor.flip(0))
        save(self, number, result)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        removed(dense("mixtral"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="block-00000.safetensors is damaged .its sums are not those of the report"):
        removed(dense("mixtral"), out=tmp_path / "out", resume=True)


def test_experts_without_a_token_go_first():
    model = dense("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[[1, 6]] = 0
        layer.mlp.gate.weight.data[[0, 2, 3, 4, 5, 7]] *= 50
    report = removed(model, ExpertPruning(score="reap"), calibration=IDS[:2])
    for layer in report.layers:
        unseen = {expert for expert in range(8) if not layer.tokens[expert]}
        assert all(layer.scores[expert] == 0 for expert in unseen)
        assert len(unseen & set(layer.removed)) == min(2, len(unseen))


def test_an_output_that_is_not_finite_names_expert_and_sample():
    model = dense("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[:, 0, 0] = torch.inf
    before = state(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.\d: its output is not finite in calibration sample 0"):
        removed(model)
    assert same(state(model), before)


def test_experts_that_are_called_twice_are_refused():
    scores = ExpertScores([], Share(World(), [], 1), [], {})
    scores._calls["experts"] = 0
    experts = type("Experts", (), {"name": "experts"})()
    with pytest.raises(ValueError, match="model: experts is called more than once in a forward"):
        scores.visit(experts, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": ExpertPruning(remove=0.9)}, "ExpertPruning.remove: expected to leave at least 2 experts to choose from"),
        ({"method": ExpertPruning(remove=0.01)}, "ExpertPruning.remove: expected a share that removes some of 8 experts"),
        ({"pattern": "2:4"}, "pattern: expected None unless then is given, since ExpertPruning removes experts; got '2:4'"),
        ({"include": ["*"]}, "include: expected none unless then is given"),
        ({"report_error": True}, "report_error: expected none unless then is given"),
        ({"then": "kprune"}, "then: expected a method that makes weights zero, such as 'sparsegpt', got 'kprune'"),
        ({"then": "gradual"}, "then: expected a method that makes weights zero, such as 'sparsegpt', got 'gradual'"),
        ({"then": "nothing"}, "method: expected one of"),
        ({"then": "wanda", "include": ["*.experts.7.*"]}, r"include: .*\*.experts.7.\*"),  # six are left
        ({"then": "wanda", "pattern": "3:7"}, "3:7"),
        ({"calibration": None}, "calibration: expected token ids, which ExpertPruning needs"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(arguments, message):
    model = dense("mixtral")
    before = state(model)
    options = dict(arguments)
    with pytest.raises(ValueError, match=message):
        removed(model, options.pop("method", None), options.pop("pattern", None), **options)
    assert same(state(model), before) and model.config.num_local_experts == 8


def test_groups_too_small_to_choose_from():
    with pytest.raises(ValueError, match="expected to leave at least 2 experts .* got 1 in 1 of 2 groups of 1"):
        removed(dense("deepseek_v3"), ExpertPruning(remove=0.75))


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("llama", "experts", "model: expected a mixture of experts, .*, got LlamaForCausalLM"),
        ("llama", "wanda", "then: expected None unless method removes experts, got 'magnitude' after 'wanda'"),
    ],
)
def test_models_and_methods_that_do_not_go_together(model, method, message):
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(tiny_model(model), method, then="magnitude" if method == "wanda" else None, **QUIET)


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of that tensor
def test_experts_that_would_be_carried_along_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    dense("mixtral").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = {"mtp.layers.0.mlp.experts.7.w1.weight": torch.zeros(3, 4)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    model = sparsekern.load(tmp_path / "model")
    with pytest.raises(ValueError, match="holds mtp.layers.0.mlp.experts.7.w1.weight, which MixtralForCausalLM does not know"):
        removed(model, out=tmp_path / "out")


def test_of_a_dense_model_made_a_mixture(tmp_path):
    model = sparsekern.moefy(tiny_model("llama"), 6, 2, calibration=IDS, progress=False)
    report = removed(model, ExpertPruning(remove=0.4), "2:4", then="magnitude", out=tmp_path / "out")
    assert report.experts == (5, 3)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["run"]["settings"]
    assert settings["method"] == {"name": "experts", "score": "reap", "remove": 0.4}
    assert settings["then"]["name"] == "magnitude" and settings["pattern"] == "2:4"
