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


def test_a_section_is_kept_and_the_page_holds_those_of_other_runs(section, tmp_path):
    (tmp_path / "quality-other.md").write_text("## Other\n\nas it was\n")
    (tmp_path / "quality-fake.md").write_text("## Fake\n\nold\n")
    section.run = lambda wikitext, quick: f"## Fake\n\n{wikitext} {quick}\n"
    command.measure("fake", "folder", False, tmp_path)
    page = command.write_page(tmp_path).read_text()
    assert page.startswith("# Quality") and page.endswith("## Fake\n\nfolder False\n\n## Other\n\nas it was\n")


def test_quick_keeps_nothing(section, tmp_path, capsys):
    section.run = lambda wikitext, quick: f"## Fake {quick}"
    command.measure("fake", None, True, tmp_path)
    assert "## Fake True" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_section_that_cannot_be_measured_stays_as_it_was(section, tmp_path, capsys):
    def run(wikitext, quick):
        raise methods.Unavailable("it needs --wikitext")

    section.run = run
    (tmp_path / "quality-fake.md").write_text("## Fake\n")
    command.measure("fake", None, False, tmp_path)
    assert capsys.readouterr().out == "fake: not measured, it needs --wikitext\n"
    assert (tmp_path / "quality-fake.md").read_text() == "## Fake\n"


def test_every_module_of_the_package_can_run():
    assert "alps" in command.names()
    for name in command.names():
        module = __import__(f"bench.methods.{name}", fromlist=["run"])
        assert callable(module.run) and module.__doc__
