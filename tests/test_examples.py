"""Every example runs, on tiny models."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import sparsekern
from tests import encoders, tiny

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ARGUMENTS = {
    "prune_model.py": ["model", "--out", "made", "--text", "text.txt", "--samples", "4", "--length", "16"],
    "packed_model.py": ["pruned", "--tokens", "3"],
    "one_linear.py": [],
    "several_texts.py": ["model", "--texts", "text.txt", "other.txt", "--samples", "4", "--length", "16"],
    "smaller_encoder.py": ["encoder", "--text", "text.txt", "--sentences", "8"],
    "fine_tune.py": ["model", "--text", "text.txt", "--samples", "4", "--length", "16"],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    tiny.save_folder(tmp_path / "model")
    encoders.save_folder(tmp_path / "encoder")
    sparsekern.prune(model := tiny.llama(), "magnitude", 0.5, progress=False)
    sparsekern.save(model, tmp_path / "pruned", tokenizer=tiny.tokenizer())
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(tiny.TEXT[::-1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)
    assert all(len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40 for name in ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, workplace, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()
