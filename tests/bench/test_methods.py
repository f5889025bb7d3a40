"""`python -m bench.methods`: how sections are kept and put together, without measuring anything."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from bench import methods
from bench.methods import __main__ as command


@pytest.fixture
def section(monkeypatch):
    """A method named `fake` whose `run` is what the test puts there."""
    module = ModuleType("bench.methods.fake")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_figures_are_merged_by_key(tmp_path):
    assert methods.stored("fake", tmp_path) == {}
    methods.store("fake", {"a": 1, "b": 2}, tmp_path)
    methods.store("fake", {"b": 3}, tmp_path)
    assert methods.stored("fake", tmp_path) == {"a": 1, "b": 3}


def test_the_page_is_made_of_what_is_stored(section, tmp_path):
    section.section = lambda figures: f"## Fake\n\n{figures}\n"
    methods.store("fake", {"a": 1}, tmp_path, {"date": "2026-01-02", "commit": "1111111111", "cpu": "A CPU"})
    page = command.write_page(["alps", "fake"], tmp_path).read_text()  # nothing of the former
    assert page.startswith("# Quality") and "ALPS" not in page
    assert page.endswith("\n\n## Fake\n\n{'a': 1}\n\nMeasured (date, commit):\n\n* 2026-01-02, 1111111111: cpu A CPU.\n")


def test_a_section_is_shown(section, capsys):
    section.run = lambda wikitext, quick: f"## Fake {wikitext} {quick}"
    command.measure("fake", "folder", True)
    assert capsys.readouterr().out == "## Fake folder True\n"


def test_what_cannot_be_measured_says_why(section, capsys):
    def run(wikitext, quick):
        raise methods.Unavailable("it needs --wikitext")

    section.run = run
    command.measure("fake", None, False)
    assert capsys.readouterr().out == "fake: not measured, it needs --wikitext\n"


def test_every_module_of_the_package_can_run():
    assert "alps" in command.names()
    for name in command.names():
        module = __import__(f"bench.methods.{name}", fromlist=["run"])
        assert callable(module.run) and callable(module.section) and module.__doc__
