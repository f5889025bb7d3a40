import json

import pytest

from sparsekern.pruning import LayerReport, Report


@pytest.fixture
def report() -> Report:
    return Report(
        layers=[
            LayerReport("model.layers.0.q", "2:4", (8, 4), 16, 0.125, 0.5),
            LayerReport("model.layers.0.down", "0.75", (4, 8), 24, None, 0.25),
        ],
        seconds={"forward": 1.5, "total": 2.0},
        settings={"method": {"name": "sparsegpt"}, "seed": 0},
        calibration_tokens=64,
    )


def test_sparsity_is_over_all_pruned_weights(report):
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.75]
    assert report.sparsity == 40 / 64


def test_json_holds_everything(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["sparsity"] == 0.625
    assert written["seconds"] == {"forward": 1.5, "total": 2.0}
    assert written["settings"]["method"]["name"] == "sparsegpt"
    assert written["calibration_tokens"] == 64
    first = written["layers"][0]
    assert first.pop("sparsity") == 0.5
    assert LayerReport.from_dict(first) == report.layers[0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_table_is_readable(report):
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "pattern", "zeros", "error", "seconds"]
    assert lines[1].split() == ["model.layers.0.q", "8", "x", "4", "2:4", "50.00%", "1.250e-01", "0.50"]
    assert lines[2].split() == ["model.layers.0.down", "4", "x", "8", "0.75", "75.00%", "-", "0.25"]
    assert lines[3] == "2 layers, 62.50% zeros; seconds: forward 1.5, total 2.0"
    assert len({len(line) for line in lines[:3]}) == 1
