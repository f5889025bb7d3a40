"""Names for whole settings: what they stand for, and what they do not go with."""

import pytest
import torch

import sparsekern
from sparsekern.cli.main import main
from sparsekern.pattern import NM, Unstructured
from sparsekern.pruning.quality import PRESETS, Preset, with_quality
from tests import tiny
from tests.models.families import tiny_ids, tiny_model

from .unfinished import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for:sparsekern.SparsekernWarning")


@pytest.mark.parametrize(
    ("quality", "settings"),
    [
        ("fast", {"method": "sparsegpt"}),
        ("good", {"method": "alps", "correction": "dense"}),
        ("best", {"method": "alps", "correction": "dense", "allocation": "fisher", "tune": sparsekern.BlockTuning()}),
    ],
)
def test_a_name_gives_the_bits_of_its_settings(quality, settings):
    models = tiny_model("llama"), tiny_model("llama")
    sparsekern.prune(models[0], pattern=0.5, calibration=tiny_ids(), quality=quality, **QUIET)
    report = sparsekern.prune(models[1], pattern=0.5, calibration=tiny_ids(), **settings, **QUIET)
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())
    assert report.settings.get("correction") == settings.get("correction")


def test_zeros_are_allocated_only_where_the_pattern_is_a_share():
    for pattern, allocation in ((None, "uniform"), (NM(2, 4), "uniform"), (Unstructured(0.5), "fisher")):
        assert with_quality("best", pattern, None, Preset()).allocation == allocation
    assert set(PRESETS) == {"fast", "good", "best"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "better"}, "quality: expected one of 'fast', 'good', 'best' or None, got 'better'"),
        ({"quality": "good", "method": "wanda"}, "quality: expected None beside method, which it chooses, got 'good'"),
        ({"quality": "best", "tune": sparsekern.BlockTuning()}, "quality: expected None beside tune, which it chooses, got 'best'"),
        ({"quality": "fast", "correction": "dense"}, "quality: expected None beside correction, which it chooses, got 'fast'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(tiny_model("llama"), calibration=tiny_ids(), **options, **QUIET)


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
