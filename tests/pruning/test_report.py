import json
import re
from xml.etree import ElementTree

import pytest

from sparsekern.reports import ContinualReport, LayerReport, Report, Step
from sparsekern.reports.html import html_page


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


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_shows_everything_and_fetches_nothing(report, tmp_path):
    report.bytes = {"dense": 2_000_000, "saved": 1_140_000}
    results = {"perplexity, dense": 10.93, "perplexity, pruned": 24.75, "evaluated on": "8 x 64 tokens"}
    page = html_page({"command": "sparsekern prune 'a & b'", "results": results, **report.to_dict()})
    for shown in ("10.93", "24.75", "8 x 64 tokens", "1.1 MB (57%)", "62.5%", "1.250e-01", "&#x27;a &amp; b&#x27;", "1.5 s"):
        assert shown in page, shown
    assert len(plots(page)) == 5  # perplexity, size, error, zeros, time
    assert not re.search(r"(?:src|href|url|@import)\s*[=(]|<script", page)
    report.to_html(tmp_path / "report.html")
    assert len(plots((tmp_path / "report.html").read_text())) == 4 and len(list(tmp_path.iterdir())) == 1


def test_a_point_for_each_error_that_is_known(report):
    report.layers = [LayerReport(f"layers.{i}.{kind}", "2:4", (4, 4), 8, 10.0**-i, 0.1) for i in range(3) for kind in ("q", "down")]
    report.layers += [LayerReport("head", "2:4", (4, 4), 8, None, 0.1), LayerReport("layers.2.o", "2:4", (4, 4), 8, 0.0, 0.1)]
    error = plots(html_page(report.to_dict()))[0]
    titles = [title.text for title in error.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(f"layers.{i}.{kind}: {10.0**-i:.3e}" for i in range(3) for kind in ("q", "down"))
    heights = [float(dot.get("cy")) for dot in error.iter("{http://www.w3.org/2000/svg}circle") if list(dot)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)  # a decade each


def test_names_cannot_break_out_of_the_page(report):
    report.layers = [LayerReport("layers.0.<script>&", "2:4", (4, 4), 8, 0.5, 0.1)]
    page = html_page(report.to_dict())
    assert "<script>" not in page and "layers.0.&lt;script&gt;&amp;" in page
    assert len(plots(page)) == 2 and "50.0% in every linear" in page  # error, time


def test_an_empty_report_has_a_page():
    assert "Pruning report" in html_page({"sparsity": 0.0, "layers": [], "seconds": {}})


def test_a_page_of_a_continual_run(tmp_path):
    steps = [
        Step("wiki & co", 64, 0.5, None, 1.25, {"wiki & co": 30.5}),
        Step("docs", 64, 0.5, 0.1, 2.5, {"wiki & co": 34.0, "docs": 21.0}),
    ]
    report = ContinualReport({"method": {"name": "copal"}, "strategy": "accumulate"}, {"wiki & co": 17.0, "docs": 11.0}, steps)
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    shown = [
        "copal",
        "27.5",
        "-3.5",
        "<td>wiki &amp; co</td><td>30.5</td><td>–</td>",
        "<td>docs</td><td>34</td><td>21</td>",
        "2.5 s",
    ]
    assert [text for text in shown if text not in page] == []
    points = [title.text for title in plots(page)[0].iter("{http://www.w3.org/2000/svg}title")]
    assert "docs, after dense: 11" in points and "wiki & co, after docs: 34" in points and len(points) == 5
    bare = ContinualReport({}, {}, [Step("a", 64, 0.5, None, 1.0)])
    bare.to_html(tmp_path / "bare.html")
    assert len(plots((tmp_path / "bare.html").read_text())) == 1  # time
