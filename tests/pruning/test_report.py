"""Reports: what they say, the file that holds them and the page that shows them."""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.reports import ContinualReport, ContinualStep, LayerReport, RemovalReport, Report, SubLayerReport
from sparsekern.reports.html import by_block, render
from sparsekern.reports.plots import Bar, Point, bars, lines

TITLE = "{http://www.w3.org/2000/svg}title"
CIRCLE = "{http://www.w3.org/2000/svg}circle"


def blocks() -> Report:
    return Report(
        layers=[
            LayerReport("model.layers.0.q", "2:4", (8, 4), 16, 0.125, 0.5),
            LayerReport("model.layers.0.down", "0.75", (4, 8), 24, None, 0.25),
        ],
        seconds={"forward": 1.5, "total": 2.0},
        settings={"method": {"name": "sparsegpt", "damping": 0.01}, "seed": 0, "pattern": "2:4"},
        versions={"torch": "2.13", "threads": 2},
        calibration_tokens=64,
    )


def removal() -> RemovalReport:
    return RemovalReport(
        layers=[SubLayerReport("encoder.0", "heads", 4, 3, 0.25, 1.5), SubLayerReport("encoder.0", "neurons", 64, 40, 0.5, 0.5)],
        settings={"method": {"name": "kprune"}},
        flops=(200.0, 100.0),
        parameters=(400, 300),
        model_parameters=(3_000_000, 2_000_000),
        calibration_tokens=9,
        resumed_blocks=1,
    )


def continual() -> ContinualReport:
    steps = [
        ContinualStep("wiki & co", 64, 0.5, None, 1.25, {"wiki & co": 30.5}),
        ContinualStep("docs", 64, 0.5, 0.1, 2.5, {"wiki & co": 34.0, "docs": 21.0}),
    ]
    settings = {"method": {"name": "copal"}, "strategy": "accumulate"}
    return ContinualReport(settings=settings, dense={"wiki & co": 17.0, "docs": 11.0}, steps=steps)


@pytest.fixture
def report() -> Report:
    return blocks()


def page_of(report) -> str:
    return render(report.page())


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_sparsity_is_over_all_pruned_weights(report):
    report.layers.append(LayerReport("model.layers.0.up", "0.25", (8, 8), 16, None, 0.25))
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.75, 0.25]
    assert report.sparsity == 56 / 128 and report.model_sparsity is None
    report.model_parameters = 512
    assert report.model_sparsity == 56 / 512
    assert str(report).splitlines()[-1].startswith("3 layers, 43.75% zeros, 10.94% of all weights; seconds: ")
    assert ("zeros of all weights", "10.9%") in report.page().facts


def test_shares_of_a_removal():
    assert (removal().flops_removed, removal().parameters_removed) == (0.5, 0.25)


def test_empty_reports_have_shares_of_zero():
    assert (Report().sparsity, RemovalReport().flops_removed, RemovalReport().parameters_removed) == (0, 0, 0)
    assert "0 layers" in str(Report()) and "0.00% of the FLOPs" in str(RemovalReport())


def test_table_is_readable(report):
    rows = str(report).splitlines()
    assert rows[0].split() == ["layer", "shape", "pattern", "zeros", "error", "seconds"]
    assert rows[1].split() == ["model.layers.0.q", "8", "x", "4", "2:4", "50.00%", "1.250e-01", "0.50"]
    assert rows[2].split() == ["model.layers.0.down", "4", "x", "8", "0.75", "75.00%", "-", "0.25"]
    assert rows[3] == "2 layers, 62.50% zeros; seconds: forward 1.5, total 2.0"
    assert len({len(row) for row in rows[:3]}) == 1


def test_the_schema_of_the_file(report, tmp_path):
    report.measured = {"perplexity, pruned": 12.5}
    report.to_json(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written) == ["schema", "kind", "run", "results", "layers"] and (written["schema"], written["kind"]) == (1, "blocks")
    assert written["run"] == {
        "command": None,
        "settings": report.settings,
        "versions": report.versions,
        "seconds": report.seconds,
        "calibration_tokens": 64,
        "resumed_blocks": 0,
    }
    shares = {"sparsity": 0.625, "model_parameters": 0, "model_sparsity": None}
    stages = {"training": [], "tuning": [], "distillation": []}
    assert written["results"] == {**shares, **stages, "size": {}, "measured": {"perplexity, pruned": 12.5}}
    assert written["layers"][0] == {
        "name": "model.layers.0.q",
        "pattern": "2:4",
        "shape": [8, 4],
        "zeros": 16,
        "error": 0.125,
        "seconds": 0.5,
        "output_error": None,
        "output_error_alone": None,
        "values_error": None,
        "correction": None,
        "sparsity": 0.5,
    }


@pytest.mark.parametrize("make", [blocks, removal, continual, Report, RemovalReport, ContinualReport])
def test_every_kind_is_read_back(make, tmp_path):
    report = make()
    report.command, report.size = "sparsekern prune 'ä'", {"dense": 20, "saved": 10}
    report.measured = {"perplexity, pruned": math.inf, "evaluated on": "8 x 64 tokens", "worst": -math.inf}
    report.to_json(tmp_path / "report.json")
    for cls in (Report, RemovalReport, ContinualReport):
        found = cls.from_json(tmp_path / "report.json")
        assert type(found) is type(report) and found == report and str(found) == str(report)


def test_infinity_and_nan_are_strict_json_and_come_back(report, tmp_path):
    report.layers = [replace(report.layers[0], error=math.inf), replace(report.layers[1], output_error=math.nan)]
    report.training = [{"step": 1, "loss": math.nan}]
    report.to_json(tmp_path / "report.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert written["layers"][0]["error"] == "Infinity" and written["layers"][1]["output_error"] == "NaN"
    found = Report.from_json(tmp_path / "report.json")
    assert found.layers[0].error == math.inf and math.isnan(found.layers[1].output_error) and math.isnan(found.training[0]["loss"])


def test_infinite_perplexities_of_a_continual_run(tmp_path):
    report = continual()
    report.steps[1].perplexity["docs"] = math.inf
    report.to_json(tmp_path / "report.json")
    assert ContinualReport.from_json(tmp_path / "report.json") == report
    assert report.average_perplexity == math.inf and "average perplexity inf" in str(report)
    page = page_of(report)
    assert "<td>inf</td>" in page and "Not drawn: docs, after docs: inf." in page and len(plots(page)) == 2
    report.steps[0].perplexity["wiki & co"] = report.steps[1].perplexity["wiki & co"] = math.inf
    assert math.isnan(report.backward_transfer)
    report.to_json(tmp_path / "report.json")


def test_a_name_that_utf8_cannot_hold_is_kept(report, tmp_path):
    report.layers = [replace(report.layers[0], name="layers.0.\udc80\x00ä")]
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    report.to_html(tmp_path / "report.html")
    assert len(plots((tmp_path / "report.html").read_text(encoding="utf-8"))) == 2


def changed(report, *places: tuple) -> dict:
    """The JSON of a report with values put at places; `del` takes the key away."""
    written = json.loads(json.dumps(report.to_dict()))
    for *path, key, value in places:
        entry = written
        for step in path:
            entry = entry[step]
        if value is del_:
            del entry[key]
        else:
            entry[key] = value
    return written


del_ = object()


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (blocks, ("schema", 2), "has schema 2; this version of sparsekern reads up to 1, a newer one is needed"),
        (blocks, ("schema", True), "schema: expected a whole number of at least 1, got True"),
        (blocks, ("schema", "1"), "schema: expected a whole number of at least 1, got '1'"),
        (blocks, ("schema", del_), r"it has no 'schema' \(sparsekern 0.1 wrote reports without one\)"),
        (blocks, ("kind", "nothing"), "kind: expected one of blocks, continual, experts, removal, got 'nothing'"),
        (blocks, ("kind", ["blocks"]), "kind: expected text, got a list"),
        (removal, ("kind", "blocks"), r"layers\[0\]: expected a field 'pattern', found none"),
        (blocks, ("extra", 1), "unknown field 'extra'; schema 1 has none of that name"),
        (blocks, ("run", "extra", 1), "run: unknown field 'extra'"),
        (blocks, ("results", "extra", 1), "results: unknown field 'extra'"),
        (blocks, ("layers", 1, "extra", 1), r"layers\[1\]: unknown field 'extra'"),
        (blocks, ("run", del_), "expected a field 'run', found none"),
        (blocks, ("run", []), "run: expected an object, got a list"),
        (blocks, ("layers", {}), "layers: expected a list, got an object"),
        (blocks, ("layers", 0, "a"), 'layers: expected an object, got "a"'),
        (blocks, ("layers", 0, "error", "large"), r"layers\[0\]: error: expected a number, got \"large\""),
        (blocks, ("layers", 0, "error", True), r"layers\[0\]: error: expected a number, got a truth value"),
        (blocks, ("layers", 0, "zeros", 33), r"layers\[0\]: zeros: expected at most 32, all weights of shape \[8, 4\], got 33"),
        (blocks, ("layers", 0, "zeros", -1), r"layers\[0\]: zeros: expected a whole number of at least 0, got -1"),
        (blocks, ("layers", 0, "zeros", 1.5), r"layers\[0\]: zeros: expected a whole number of at least 0, got 1.5"),
        (blocks, ("layers", 0, "shape", [8]), r"layers\[0\]: shape: expected a list of two, got a list"),
        (blocks, ("layers", 0, "shape", [8, 0]), r"layers\[0\]: shape: expected at least one weight, got \[8, 0\]"),
        (blocks, ("layers", 0, "seconds", None), r"layers\[0\]: seconds: expected a number, got null"),
        (blocks, ("layers", 0, "name", del_), r"layers\[0\]: expected a field 'name', found none"),
        (blocks, ("results", "size", {"dense": 1}), r"size: expected dense and saved, got \['dense'\]"),
        (blocks, ("results", "size", {"dense": 1, "saved": -1}), "size: expected a whole number of at least 0, got -1"),
        (blocks, ("results", "measured", {"a": []}), "measured: expected a number, got a list"),
        (blocks, ("results", "training", [1]), "training: expected an object, got 1"),
        (blocks, ("run", "command", 1), "command: expected text, got 1"),
        (removal, ("layers", 0, "kept", 5), r"layers\[0\]: kept: expected at most 4, got 5"),
        (removal, ("layers", 0, "units", 0), r"layers\[0\]: units: expected at least 1, got 0"),
        (removal, ("layers", 0, "kind", "experts"), r"layers\[0\]: kind: expected heads or neurons, got 'experts'"),
        (removal, ("results", "flops", [1, "a"]), 'flops: expected a number, got "a"'),
        (continual, ("results", "steps", 1, "perplexity", ["docs"]), r"steps\[1\]: perplexity: expected an object, got a list"),
        (continual, ("layers", [{"name": "a"}]), r"layers\[0\]: unknown field 'name'"),
    ],
)
def test_what_is_no_report_is_refused_by_name(make, place, message, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(changed(make(), place)))
    with pytest.raises(ValueError, match=message) as raised:
        Report.from_json(path)
    assert str(path) in str(raised.value)


def test_what_follows_from_other_fields_need_not_be_there(report, tmp_path):
    written = changed(report, ("results", "sparsity", del_), ("layers", 0, "sparsity", del_), ("layers", 1, "output_error", del_))
    (tmp_path / "report.json").write_text(json.dumps(written))
    assert Report.from_json(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not the JSON of a report"),
        (b'{"schema": 1, "ki', "is not the JSON of a report"),
        (b"\xff\xfe{", "is not the JSON of a report .*utf-8"),
        (b"[" * 100_000, "is not the JSON of a report"),
        (b'{"schema": 1, "kind": NaN}', "NaN is not JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got null"),
        (b'"text"', 'expected a JSON object, got "text"'),
    ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Report.from_json(tmp_path / "report.json")


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        Report.from_json(tmp_path / "report.json")


def test_the_page_shows_everything_and_fetches_nothing(report, tmp_path):
    report.size, report.command = {"dense": 2_000_000, "saved": 1_140_000}, "sparsekern prune 'a & b'"
    report.measured = {"perplexity, dense": 10.93, "perplexity, pruned": 24.75, "evaluated on": "8 x 64 tokens"}
    page = page_of(report)
    for text in (
        "10.93",
        "24.75",
        "8 x 64 tokens",
        "1.1 MB (57%)",
        "62.5%",
        "1.250e-01",
        "&#39;a &amp; b&#39;",
        "1.5 s",
        "torch 2.13",
    ):
        assert text in page, text
    assert len(plots(page)) == 5  # perplexity, size, error, zeros, time
    assert not re.search(r"(?:src|href|url|@import)\s*[=(]|<script", page)
    report.size, report.measured = {}, {}
    report.to_html(tmp_path / "report.html")
    assert len(plots((tmp_path / "report.html").read_text())) == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_page_of_removed_units():
    page = page_of(removal())
    for text in (
        "kprune",
        "50.0%",
        "2.00 M",
        "of 3.00 M parameters left",
        "<td>3 of 4</td>",
        "<td>40 of 64</td>",
        "All 2 sub-layers",
    ):
        assert text in page, text
    share, error = plots(page)
    assert [title.text for title in share.iter(TITLE)] == ["encoder.0.heads: 75.0%", "encoder.0.neurons: 62.5%"]
    assert len(list(error.iter(TITLE))) == 2


def test_a_page_of_a_continual_run(tmp_path):
    report = continual()
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("copal", "accumulate", "27.5", "-3.5", "2.5 s"):
        assert text in page, text
    assert "<td>wiki &amp; co</td><td>30.5</td><td>–</td>" in page and "<td>docs</td><td>34</td><td>21</td>" in page
    points = [title.text for title in plots(page)[0].iter(TITLE)]
    assert "docs, after dense: 11" in points and "wiki & co, after docs: 34" in points and len(points) == 5
    assert len(plots(page_of(ContinualReport(steps=[ContinualStep("a", 64, 0.5, None, 1.0)])))) == 1  # time


@pytest.mark.parametrize("make", [Report, RemovalReport, ContinualReport])
def test_an_empty_report_has_a_page(make):
    assert "Pruning report" in page_of(make()) and not plots(page_of(make()))


def test_a_point_for_each_error_that_is_known(report):
    report.layers = [LayerReport(f"layers.{i}.{kind}", "2:4", (4, 4), 8, 10.0**-i, 0.1) for i in range(3) for kind in ("q", "down")]
    report.layers += [LayerReport("head", "2:4", (4, 4), 8, None, 0.1), LayerReport("layers.2.o", "2:4", (4, 4), 8, 0.0, 0.1)]
    error = plots(page_of(report))[0]
    titles = [title.text for title in error.iter(TITLE)]
    assert sorted(titles) == sorted(f"layers.{i}.{kind}: {10.0**-i:.3e}" for i in range(3) for kind in ("q", "down"))
    heights = [float(dot.get("cy")) for dot in error.iter(CIRCLE) if list(dot)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)  # a decade each


def test_an_infinite_error_is_named_instead_of_drawn(report):
    report.layers = [LayerReport(f"layers.{i}.q", "2:4", (4, 4), 8, error, 0.1) for i, error in enumerate((0.5, math.inf, 0.25))]
    page = page_of(report)
    assert "Not drawn: layers.1.q: inf." in page and "<td>inf</td>" in page
    assert len(list(plots(page)[0].iter(TITLE))) == 2
    report.layers = [replace(layer, error=math.nan) for layer in report.layers]
    assert "Not drawn: layers.0.q: nan; layers.1.q: nan; layers.2.q: nan." in page_of(report)
    report.layers *= 2
    assert "layers.2.q: nan and 3 more." in page_of(report)


MARKUP = "</td></svg><script>alert(1)</script>{{ 7 * 7 }}{% raw %}&\"'"


def test_no_text_is_taken_for_markup():
    """Whatever a report holds from outside: names of layers and datasets, settings, the command line, versions, measurements."""
    ours = blocks()
    ours.layers = [LayerReport(f"layers.0.{MARKUP}", MARKUP, (4, 4), 8, math.inf, 0.1)] * 2
    ours.settings = {"method": {"name": MARKUP}, "pattern": MARKUP}
    ours.versions, ours.command, ours.seconds = {MARKUP: MARKUP}, MARKUP, {MARKUP: 1.0}
    ours.measured = {"perplexity, pruned": 1.0, "evaluated on": MARKUP}
    cut = removal()
    cut.layers = [replace(layer, name=f"encoder.0.{MARKUP}") for layer in cut.layers]
    several = continual()
    several.steps = [ContinualStep(MARKUP, 1, 0.5, None, 1.0, {MARKUP: 2.0})]
    several.settings["strategy"] = MARKUP
    for report in (ours, cut, several):
        page = page_of(report)
        assert "<script" not in page and "{{ 7 * 7 }}" in page
        assert all(plot is not None for plot in plots(page)) and page.count("<svg") == page.count("</svg>") == len(plots(page)) > 0


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.booleans())
def test_any_numbers_can_be_drawn(values, log):
    drawn = lines({"a": [Point(x, y, f"{y}") for x, y in enumerate(values)]}, x_label="x", log=log)
    expected = sum((1e-300 if log else 0) <= y <= 1e300 for y in values)
    assert bool(drawn) == bool(expected)
    texts = [drawn, bars([Bar("a", y, f"{y}") for y in values])]
    for svg in filter(None, texts):
        for element in ElementTree.fromstring(svg).iter():
            places = [element.get(name) for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height")]
            assert all(math.isfinite(float(place)) for place in places if place is not None)
    if drawn:
        assert len(list(ElementTree.fromstring(drawn).iter(TITLE))) == expected


def test_many_experts_are_one_line_and_one_series():
    names = [f"model.layers.{block}.mlp.experts.{expert}.down_proj" for block in (0, 1) for expert in range(9)]
    few = [f"model.layers.0.mlp.{index}.weight" for index in range(8)]  # no more than are shown one by one
    layers = [LayerReport(name, "2:4", (4, 8), 16, float(number), 1.0) for number, name in enumerate([*names, *few])]
    text = str(Report(layers=layers)).splitlines()
    rows = [line.split()[0] for line in text[1:-1]]
    assert rows == ["model.layers.0.mlp.experts.*.down_proj", "model.layers.1.mlp.experts.*.down_proj", *few]
    assert "4.000e+00" in text[1] and "9.00" in text[1] and text[1].endswith("(9 experts, means)")
    series = by_block(((layer.name, layer.error) for layer in layers), ".1f")
    points = series["mlp.experts.*.down_proj"]
    assert [(point.x, point.y) for point in points] == [(0, 4.0), (1, 13.0)]
    assert len(series) == 9 and all(len(points) == 1 for label, points in series.items() if "*" not in label)
