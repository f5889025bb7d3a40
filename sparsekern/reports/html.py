"""`report.html`: what `report.json` holds, for people to look at. One file, no scripts, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html import escape
from typing import NamedTuple

from .plots import Bar, Point, bars, lines

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #d0d7de; --bar: #2f78b7; --before: #9aa4ae; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --faint: #3d444d; --bar: #4a97d8; --before: #768390; --page: #14181d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { max-width: 100%; height: auto; display: block; }
code, pre { font-size: 13px; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 12px 2px 0; text-align: right; border-bottom: 1px solid var(--faint); }
td:first-child, th:first-child { text-align: left; }
details { margin-top: 2rem; }
.facts { display: flex; flex-wrap: wrap; gap: 2.5rem; } .facts b { display: block; font-size: 1.5rem; font-weight: 600; }
"""
BEFORE = "var(--before, #9aa4ae)"
INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
COLUMNS: dict[str, Callable[[Mapping], str]] = {
    "linear": lambda layer: layer["name"],
    "shape": lambda layer: " × ".join(map(str, layer["shape"])),
    "pattern": lambda layer: layer["pattern"],
    "zeros": lambda layer: f"{layer['sparsity']:.2%}",
    "error": lambda layer: "–" if layer["error"] is None else f"{layer['error']:.3e}",
    "seconds": lambda layer: f"{layer['seconds']:.2f}",
}
UNIT_COLUMNS: dict[str, Callable[[Mapping], str]] = {
    "block": lambda layer: layer["name"],
    "units": lambda layer: layer["kind"],
    "kept": lambda layer: f"{layer['kept']} of {layer['units']}",
    "error": COLUMNS["error"],
    "seconds": COLUMNS["seconds"],
}


class Step(NamedTuple):
    """A row of a continual run's perplexities."""

    name: str
    perplexity: Mapping[str, float]


def html_page(report: Mapping) -> str:
    """The page of what `Report.to_dict` gives, that of a `StructuredReport` included; `command` and `results` of the command line are
    shown where they are there."""
    layers = report["layers"]
    cut = "flops_removed" in report
    sections = [_facts(report), _perplexity(report.get("results", {})), _size(report.get("bytes", {}))]
    sections += _by_sublayer(layers) if cut else _by_layer(layers)
    sections += [
        _time(report["seconds"]),
        _table(layers, *((UNIT_COLUMNS, f"{len(layers)} sub-layers") if cut else (COLUMNS, f"{len(layers)} linears"))),
        _about(report),
    ]
    return _page(sections)


def continual_page(report: Mapping) -> str:
    """The page of what `ContinualReport.to_dict` gives; `command` is shown where it is there."""
    settings, steps = report["settings"], report["steps"]
    facts = [("method", settings.get("method", {}).get("name")), ("strategy", settings.get("strategy")), ("data sets", len(steps))]
    if report["average_perplexity"] is not None:
        facts.append(("average perplexity", f"{report['average_perplexity']:.4g}"))
    if report["backward_transfer"] is not None:
        facts.append(("backward transfer (negative: forgetting)", f"{report['backward_transfer']:+.3g}"))
    rows = ([Step("dense", report["dense"])] if report["dense"] else []) + [
        Step(step["name"], step["perplexity"]) for step in steps
    ]
    series: dict[str, list[Point]] = {}
    for x, row in enumerate(rows, start=0 if report["dense"] else 1):
        for name, value in row.perplexity.items():
            series.setdefault(name, []).append(Point(x, value, f"{name}, after {row.name}: {value:.4g}"))
    columns = {"after": lambda row: row.name}
    columns |= {
        name: lambda row, name=name: f"{row.perplexity[name]:.4g}" if name in row.perplexity else "–" for name in report["names"]
    }
    plot = lines(series, x_label="data sets taken in", log=True)
    seconds = bars([Bar(step["name"], step["seconds"], f"{step['seconds']:.1f} s") for step in steps])
    return _page(
        [
            _fact_list(facts),
            f"<h2>Perplexity of each data set, step by step</h2>\n<p>The scale is logarithmic; lower is better.</p>\n{plot}"
            if plot
            else "",
            f"<h2>Time by data set</h2>\n{seconds}",
            _table(rows, columns, "perplexities"),
            _about(report),
        ]
    )


def _page(sections: list[str]) -> str:
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>sparsekern: pruning report</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Pruning report</h1>\n'
        f"{body}\n</body>\n</html>\n"
    )


def _facts(report: Mapping) -> str:
    results, method = report.get("results", {}), report.get("settings", {}).get("method", {})
    facts = [("method", method.get("name")), ("pattern", report.get("settings", {}).get("pattern"))]
    if "flops_removed" in report:
        before, after = report["model_parameters"]
        facts += [("of the FLOPs of heads and neurons removed", f"{report['flops_removed']:.1%}")]
        facts += [(f"of {before / 1e6:,.2f} M parameters left", f"{after / 1e6:,.2f} M")]
    else:
        facts += [("zeros in the pruned linears", f"{report['sparsity']:.1%}"), ("linears", len(report["layers"]))]
    if report.get("calibration_tokens"):
        facts.append(("calibration tokens", f"{report['calibration_tokens']:,}"))
    if "perplexity, pruned" in results:
        facts.append(("perplexity", f"{results['perplexity, pruned']:.4g}"))
    if "total" in report["seconds"]:
        facts.append(("seconds", f"{report['seconds']['total']:.1f}"))
    return _fact_list(facts)


def _fact_list(facts: list[tuple[str, object]]) -> str:
    shown = "".join(f"<div><b>{escape(str(value))}</b>{escape(name)}</div>" for name, value in facts if value is not None)
    return f'<div class="facts">{shown}</div>'


def _perplexity(results: Mapping) -> str:
    rows = [
        Bar(label, results[key], f"{results[key]:.4g}", *colour)
        for label, key, colour in (("dense", "perplexity, dense", [BEFORE]), ("pruned", "perplexity, pruned", []))
        if key in results
    ]
    note = f"<p>{escape(str(results['evaluated on']))}; lower is better.</p>" if "evaluated on" in results else ""
    return f"<h2>Perplexity</h2>\n{bars(rows)}\n{note}" if rows else ""


def _size(sizes: Mapping[str, int]) -> str:
    if not sizes:
        return ""
    rows = [Bar("dense weights", sizes["dense"], f"{sizes['dense'] / 1e6:,.1f} MB", BEFORE)]
    rows.append(
        Bar("saved files", sizes["saved"], f"{sizes['saved'] / 1e6:,.1f} MB ({sizes['saved'] / max(1, sizes['dense']):.0%})")
    )
    return f"<h2>Size</h2>\n{bars(rows)}"


def _by_layer(layers: list[Mapping]) -> list[str]:
    error = lines(_series(layers, "error", "{:.3e}"), x_label="block", log=True)
    note = "<p>Relative squared error of each linear's output over the calibration tokens; the scale is logarithmic.</p>"
    zeros = [layer["sparsity"] for layer in layers]
    if max(zeros, default=0) - min(zeros, default=0) < 5e-4:  # a flat line says less
        sparsity = f"<p>{zeros[0]:.1%} in every linear.</p>" if zeros else ""
    else:
        sparsity = f"<p>Share of each linear's weights.</p>\n{lines(_series(layers, 'sparsity', '{:.2%}'), x_label='block')}"
    return [
        f"<h2>Error by layer</h2>\n{note}\n{error}" if error else "",
        f"<h2>Zeros by layer</h2>\n{sparsity}" if sparsity else "",
    ]


def _by_sublayer(layers: list[Mapping]) -> list[str]:
    named = [{**layer, "name": f"{layer['name']}.{layer['kind']}", "share": layer["kept"] / layer["units"]} for layer in layers]
    note = (
        "<p>Relative squared error of the residual stream behind each sub-layer over the calibration tokens, with the errors of those "
        "below; the scale is logarithmic.</p>"
    )
    return [
        f"<h2>Heads and neurons left</h2>\n<p>Share of each block's.</p>\n{lines(_series(named, 'share', '{:.1%}'), x_label='block')}",
        f"<h2>Error by sub-layer</h2>\n{note}\n{lines(_series(named, 'error', '{:.3e}'), x_label='block', log=True)}",
    ]


def _series(layers: list[Mapping], field: str, text: str) -> dict[str, list[Point]]:
    """One line for the linears that are named alike but for the number of their block."""
    series: dict[str, list[Point]] = {}
    for position, layer in enumerate(layers):
        if layer[field] is None:
            continue
        name = layer["name"]
        index = INDEX.search(name)
        kind = name[index.end() :] if index else name
        point = Point(int(index[1]) if index else position, layer[field], f"{name}: {text.format(layer[field])}")
        series.setdefault(kind, []).append(point)
    return series


def _time(seconds: Mapping[str, float]) -> str:
    rows = [Bar(phase, taken, f"{taken:.1f} s") for phase, taken in seconds.items() if phase != "total"]
    return f"<h2>Time by phase</h2>\n{bars(rows)}" if rows else ""


def _table(rows_of: list, columns: Mapping[str, Callable[[object], str]], what: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = ("".join(f"<td>{escape(text(layer))}</td>" for text in columns.values()) for layer in rows_of)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<details>\n<summary>All {what}</summary>\n<table>\n<tr>{head}</tr>\n{body}\n</table>\n</details>"


def _about(report: Mapping) -> str:
    command = f"<h2>Made with</h2>\n<pre>{escape(report['command'])}</pre>" if "command" in report else ""
    versions = report.get("versions") or report.get("settings", {}).get("versions") or {}
    said = ", ".join(f"{name} {value}" for name, value in versions.items())
    return f"{command}\n<p>{escape(said)}</p>" if said else command
