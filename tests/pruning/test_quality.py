"""Names for whole settings: what they stand for, and what they do not go with."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.cli.main import main
from sparsekern.pattern import NM, Unstructured
from sparsekern.pruning.quality import PRESETS, Preset, with_quality
from sparsekern.pruning.tuning import checks
from tests import tiny
from tests.models.families import tiny_ids, tiny_model
from tests.models.zoo import ZOO

from .unfinished import QUIET

TRAINED = sparsekern.Distill(steps=1, batch_tokens=32)
pytestmark = pytest.mark.filterwarnings("ignore:.*(calibration tokens for|never active):sparsekern.SparsekernWarning")


@pytest.mark.parametrize(
    ("quality", "settings"),
    [
        ("fast", {"method": "sparsegpt"}),
        ("good", {"method": "alps", "correction": "dense"}),
        (
            "best",
            {
                "method": "alps",
                "correction": "dense",
                "allocation": "fisher",
                "tune": sparsekern.BlockTuning(),
                "distill": TRAINED,
            },
        ),
    ],
)
def test_a_name_gives_the_bits_of_its_settings(quality, settings, monkeypatch):
    assert PRESETS["best"].distill == sparsekern.Distill()  # whose 200 steps are too many here
    monkeypatch.setitem(PRESETS, "best", replace(PRESETS["best"], distill=TRAINED))
    models = tiny_model("llama"), tiny_model("llama")
    sparsekern.prune(models[0], pattern=0.5, calibration=tiny_ids(), quality=quality, **QUIET)
    report = sparsekern.prune(models[1], pattern=0.5, calibration=tiny_ids(), **settings, **QUIET)
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())
    assert report.settings.get("correction") == settings.get("correction")


def test_zeros_are_allocated_only_where_the_pattern_is_a_share():
    for pattern, allocation in ((None, "uniform"), (NM(2, 4), "uniform"), (Unstructured(0.5), "fisher")):
        assert with_quality("best", pattern, None, Preset()).allocation == allocation
        assert with_quality("best", pattern, None, Preset(allocation="mixed")).allocation == "mixed"  # where it is asked for
    assert set(PRESETS) == {"fast", "good", "best"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "better"}, "quality: expected one of 'fast', 'good', 'best' or None, got 'better'"),
        ({"quality": "good", "method": "wanda"}, "quality: expected None beside method, which it chooses, got 'good'"),
        ({"quality": "good", "method": sparsekern.Wanda()}, "quality: expected None beside method, which it chooses, got 'good'"),
        ({"quality": "fast", "correction": "dense"}, "quality: expected None beside correction, which it chooses, got 'fast'"),
        ({"quality": "best", "allocation": "fisher"}, "quality: expected None beside allocation, which it chooses, got 'best'"),
        (
            {"quality": "best", "distill": sparsekern.Distill(), "then": "wanda"},
            "then: expected None unless method removes experts",
        ),
        ({"quality": "good", "tune": True}, r"tune: expected a config such as BlockTuning\(\), or None, got True"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sparsekern.prune(tiny_model("llama"), calibration=tiny_ids(), **options, **QUIET)


def test_settings_of_its_method_and_of_training_are_taken_besides():
    method, tune = sparsekern.ALPS(damping=0.02), sparsekern.BlockTuning(passes=1)
    found = with_quality("best", None, method, Preset(tune=tune))
    assert found == Preset(method, "dense", "uniform", tune, sparsekern.Distill())
    assert with_quality("fast", None, None, Preset(distill=TRAINED)) == Preset("sparsegpt", distill=TRAINED)


def test_what_a_run_cannot_do_is_left_out_with_a_warning(tmp_path):
    folder = tiny.save_folder(tmp_path / "model")
    said = "^quality: 'best' leaves out distill for a streamed model, "
    with pytest.warns(sparsekern.SparsekernWarning, match=said):
        report = sparsekern.prune(
            sparsekern.load(folder, stream=True),
            pattern=0.5,
            calibration=tiny_ids(),
            quality="best",
            out=tmp_path / "best",
            **QUIET,
        )
    assert report.tuning and not report.distillation
    assert report.settings["correction"] == "dense" and report.settings["allocation"] == "fisher"
    assert "distill" not in report.settings


def test_an_encoder_is_pruned_without_the_training_of_predictions():
    config = tf.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    said = "quality: 'best' leaves out distill for a model that predicts no next tokens"
    with pytest.warns(sparsekern.SparsekernWarning, match=said):
        report = sparsekern.prune(tf.BertModel(config).eval(), calibration=tiny_ids(), quality="best", **QUIET)
    assert report.tuning and report.sparsity == 0.5


NOT_A_CHAIN = "tune for a model whose blocks take more than the output of the one before"
NO_TOKENS = "distill for a model that predicts no next tokens"


@pytest.mark.parametrize(
    ("family", "trained", "left_out"),
    [
        ("t5", {}, f"{NO_TOKENS}, and {NOT_A_CHAIN}"),
        ("swin", {}, f"{NO_TOKENS}, and {NOT_A_CHAIN}"),
        ("wav2vec2", {"tune"}, NO_TOKENS),
        ("xlm", {}, f"{NOT_A_CHAIN}, and {NO_TOKENS}: in XLMWithLMHeadModel the logits of a token change with those behind it"),
        ("mpt", {"distill"}, NOT_A_CHAIN),
    ],
)
def test_a_family_that_training_cannot_follow_is_pruned_without_it(family, trained, left_out, monkeypatch):
    preset = replace(PRESETS["best"], method="magnitude", correction="none", tune=sparsekern.BlockTuning(passes=1), distill=TRAINED)
    monkeypatch.setitem(PRESETS, "best", preset)
    if "distill" not in trained:  # memory for it is not asked for
        monkeypatch.setattr(checks, "free_bytes", lambda device: 0)
    model, calibration = ZOO[family].model(), ZOO[family].calibration()
    with pytest.warns(sparsekern.SparsekernWarning, match=f"^quality: 'best' leaves out {left_out}$"):
        report = sparsekern.prune(model, calibration=calibration, quality="best", **ZOO[family].options, **QUIET)
    assert report.sparsity == 0.5
    assert {"tune", "distill"} & report.settings.keys() == set(trained)
    assert (len(report.tuning) > 0, len(report.distillation) > 0) == ("tune" in trained, "distill" in trained)


def test_a_training_that_is_asked_for_is_refused():
    for family, options, message in (
        (
            "t5",
            {"tune": sparsekern.BlockTuning()},
            "tune: expected a model whose blocks take nothing but the output of the one before",
        ),
        (
            "xlm",
            {"distill": TRAINED},
            "model: Distill trains causal language models, but in XLMWithLMHeadModel the logits of a token",
        ),
    ):
        model, calibration = ZOO[family].model(), ZOO[family].calibration()
        with pytest.raises(ValueError, match=message):
            sparsekern.prune(model, calibration=calibration, quality="best", **options, **QUIET)


def test_the_command_line_takes_the_name(tmp_path, capsys):
    model, text = tiny.save_folder(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    options = ["--quality", "good", "--calibration", str(text), "--samples", "4", "--length", "16"]
    assert main(["prune", str(model), "--out", str(tmp_path / "out"), *options]) == 0
    settings = sparsekern.Report.from_json(tmp_path / "out" / "report.json").settings
    assert settings["method"]["name"] == "alps" and settings["correction"] == "dense"
    capsys.readouterr()
    assert main(["prune", str(model), "--out", str(tmp_path / "other"), "--method", "wanda", *options]) == 2
    assert "quality: expected None beside method, which it chooses, got 'good'" in capsys.readouterr().err
    both = ["--calibration", "builtin:python-docs"]
    assert main(["prune", str(model), "--out", str(tmp_path / "other"), *options, *both]) == 2
    assert "--correction: expected one --calibration and no --state, got 'dense'" in capsys.readouterr().err
