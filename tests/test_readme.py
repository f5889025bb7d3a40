"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from sparsekern.ops._registry import OPS
from tests import tiny

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
PIPELINE, PACKED, OPERATORS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_from_prune_to_from_pretrained(tmp_path, monkeypatch):
    tiny.save_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    program = PIPELINE.replace("path/or/hub-id", "model").replace("samples=128, length=2048", "samples=8, length=32")
    assert program.count("=32") == 1
    names: dict = {}
    exec(program, names)
    assert names["report"].sparsity == 0.5
    weight = names["model"].model.layers[0].mlp.up_proj.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    exec(PACKED, names)
    assert torch.equal(names["model"].model.layers[0].mlp.up_proj.dense_weight(), weight)


def test_the_ops():
    names: dict = {}
    exec(OPERATORS, names)
    assert torch.equal(names["new_weight"] != 0, names["mask"])
    assert names["values"].shape == (1024, 256) and names["row_error"].shape == (1024,)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_row(op):
    assert re.search(rf"^\|[^|]*`{re.escape(op)}`", README, re.MULTILINE)
