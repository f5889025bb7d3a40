"""The committed figures: whose they are, and that recording others does not change them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import methods, results
from bench.methods import __main__ as quality_page
from bench.provenance import UNKNOWN, commit_of, labels, provenance
from bench.results import Row

FIRST = {"date": "2026-01-02", "commit": "1111111111", "cpu": "A CPU", "torch": "2.10.0"}
LATER = {"date": "2026-03-04", "commit": "2222222222", "cpu": "A CPU", "torch": "2.13.0"}


def test_a_row_keeps_the_provenance_of_its_own_run(tmp_path):
    results.record([Row("ops", "a", "1x"), Row("ops", "b", "2x")], tmp_path, FIRST)
    table = results.record([Row("ops", "b", "3x"), Row("ops", "c", "4x")], tmp_path, LATER)
    rows = results.stored(table.with_suffix(".json"))
    assert [(row.what, row.reached, row.run) for row in rows] == [("a", "1x", FIRST), ("b", "3x", LATER), ("c", "4x", LATER)]
    page = table.read_text().splitlines()
    assert "| a |  | 1x |  |  | 2026-01-02, 1111111111 |" in page and "| b |  | 3x |  |  | 2026-03-04, 2222222222 |" in page
    assert "* 2026-01-02, 1111111111: cpu A CPU, torch 2.10.0." in page


def test_recording_nothing_changes_nothing(tmp_path):
    table = results.record([Row("ops", "a", "1x")], tmp_path, FIRST)
    before = table.with_suffix(".json").read_bytes(), table.read_bytes()
    assert results.record([], tmp_path, LATER) == table
    assert (table.with_suffix(".json").read_bytes(), table.read_bytes()) == before


def test_a_row_that_brings_its_provenance_keeps_it(tmp_path):
    table = results.record([Row("ops", "a", "1x", run=FIRST)], tmp_path, LATER)
    assert results.stored(table.with_suffix(".json"))[0].run == FIRST


def test_a_row_from_a_file_without_provenance_is_called_unknown(tmp_path):
    (tmp_path / "a-cpu-cpu.json").write_text(
        json.dumps({"machine": {"cpu": "A CPU"}, "rows": [{"section": "ops", "what": "old", "reached": "1x"}]})
    )
    page = results.record([Row("ops", "new", "2x")], tmp_path, LATER).read_text()
    assert "| old |  | 1x |  |  | unknown, unknown |" in page and "* unknown, unknown: nothing else is known." in page


def test_a_figure_of_quality_keeps_the_provenance_of_its_own_run(tmp_path):
    methods.store("fake", {"a": 1, "b": 2}, tmp_path, FIRST)
    methods.store("fake", {"b": 3}, tmp_path, LATER)
    assert methods.runs_of("fake", tmp_path) == {"a": FIRST, "b": LATER}


def test_runs_of_one_date_and_commit_are_told_apart():
    other = FIRST | {"torch": "2.11.0"}
    known = labels([FIRST, other, FIRST, LATER])
    assert [known.of(run) for run in (LATER, FIRST, other)] == [
        "2026-03-04, 2222222222",
        "2026-01-02, 1111111111",
        "2026-01-02, 1111111111 (2)",
    ]
    assert len(known.described()) == 3


def test_runs_that_differ_in_their_commits_alone_share_a_line():
    described = labels([FIRST, FIRST | {"commit": "3333333333"}]).described()
    assert described == ["* 2026-01-02, 3333333333; 2026-01-02, 1111111111: cpu A CPU, torch 2.10.0."]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "kernel.cpp").write_text("one")
    (tmp_path / "bench" / "results" / "cpu.json").write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_says_whether_the_code_has_changes(repository):
    commit = git(repository, "rev-parse", "--short=10", "HEAD")
    (repository / "bench" / "results" / "cpu.json").write_text("[]")  # what a part before this one has recorded
    (repository / "notes").touch()
    assert commit_of(repository) == commit
    (repository / "kernel.cpp").write_text("two")
    assert commit_of(repository) == f"{commit}+changes"
    assert provenance({"cpu": "A CPU"}, repository)["commit"] == f"{commit}+changes"


def test_a_folder_inside_another_repository_has_no_commit(repository):
    assert commit_of(repository / "bench") == UNKNOWN


def test_without_git_or_a_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    assert commit_of(tmp_path) == UNKNOWN
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == UNKNOWN


COMMITTED = sorted(results.FOLDER.glob("*.json"))
MACHINES = [path for path in COMMITTED if not path.name.startswith("quality-")]
FACTS = {"date", "commit", "kernels", "threads", *results.FACTS}


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_committed_row_says_where_it_comes_from(path):
    rows = results.stored(path)
    title = json.loads(path.read_text())["machine"]
    for row in rows:
        assert all(row.run.get(fact) for fact in FACTS) and results.title_of(row.run) == title, row.what
        assert results.path_of(row.run) == path
    assert path.with_suffix(".md").read_text() == results.as_table(title, rows)


@pytest.mark.parametrize("name", quality_page.names())
def test_every_committed_figure_of_quality_says_where_it_comes_from(name):
    assert methods.runs_of(name).keys() == methods.stored(name).keys()
    for run in methods.runs_of(name).values():
        assert all(run.get(fact) for fact in FACTS | {"cpu"})


def test_the_committed_page_of_quality_is_made_of_the_committed_figures(tmp_path):
    for path in COMMITTED:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert quality_page.write_page(quality_page.names(), tmp_path).read_text() == (results.FOLDER / "quality.md").read_text()
