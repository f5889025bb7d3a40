"""A tiny model, a text, and `sparsekern prune` of the one on the other."""

import pytest

from sparsekern.cli import main
from tests import tiny


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT)
    return str(path)


@pytest.fixture
def prune(model, text, tmp_path):
    """Runs `sparsekern prune` on the tiny model in this process; returns its exit code."""

    def run(*arguments: str, out: str = "out") -> int:
        given = ["prune", model, "--calibration", text, "--samples", "8", "--length", "32", "--out", str(tmp_path / out)]
        return main([*given, *arguments])

    return run


def exit_code(run, *arguments) -> int:
    """Return the exit code, whether the parser exits by itself or `main` returns."""
    try:
        return run(*arguments)
    except SystemExit as stopped:
        return stopped.code
