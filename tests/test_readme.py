"""What the README shows runs, and what it says of itself is true."""

import re
import shlex
from pathlib import Path

import torch

from sparsekern.cli.parser import make_parser
from sparsekern.methods import METHODS
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USE, PACKED = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = {"path/or/hub-id": "model", "samples=128, length=2048": "samples=8, length=32"}


def test_from_prune_to_a_packed_model(tmp_path, monkeypatch):
    tiny.save_folder(tmp_path / "model")
    (tmp_path / "wiki.txt").write_text(tiny.TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = USE
    for shown, small in SMALL.items():
        assert shown in program
        program = program.replace(shown, small)
    names: dict = {}
    exec(program, names)
    assert names["report"].sparsity == 0.5
    weight = names["model"].model.layers[0].mlp.up_proj.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    assert {"README.md", "report.html", "report.json", "tokenizer.json"} <= {path.name for path in Path("pruned").iterdir()}
    exec(PACKED, names)
    assert torch.equal(names["model"].model.layers[0].mlp.up_proj.dense_weight(), weight)


def test_the_shell_commands_are_taken():
    commands = re.findall(r"^sparsekern .*$", README, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])


def test_it_is_short():
    assert len(README.splitlines()) <= 90


def test_every_method_has_a_row():
    shown = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE))))
    assert shown == set(METHODS)


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)#\s]+)", README):
        assert (ROOT / link).exists(), link
