import errno
import os
import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekern
from sparsekern.runtime.save import _staging
from tests import tiny


def test_plain_transformers_loads_what_was_saved(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    path = sparsekern.save(model, tmp_path / "a" / "b", tokenizer=tiny.tokenizer())
    again = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("the fox")["input_ids"] == tiny.tokenizer()("the fox")["input_ids"]
    assert f"| sparsekern | {sparsekern.__version__} |" in (path / "README.md").read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_an_empty_folder_is_taken(tmp_path):
    sparsekern.save(tiny.llama(), tmp_path)
    assert (tmp_path / "config.json").exists()


def test_what_is_there_is_never_overwritten(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds something else \(a, b, c, …\); name a new or empty one"):
        sparsekern.save(tiny.llama(), tmp_path)
    with pytest.raises(FileExistsError, match="out: '.*a' is a file, expected a folder"):
        sparsekern.save(tiny.llama(), tmp_path / "a")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["mine"] * 4


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = tiny.llama()

    def fails(path):
        (path / "model.safetensors").write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left on device"):
        sparsekern.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_goes(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    out = tmp_path / "out*"
    others = {folder.name for folder in (_staging(out, os.getppid()), _staging(out, "it"), _staging(tmp_path / "other", ended.pid))}
    for folder in (_staging(out, ended.pid), _staging(out, os.getpid()), *map(tmp_path.joinpath, others)):
        folder.mkdir()
    sparsekern.save(tiny.llama(), out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out*", *others}


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    sparsekern.save(tiny.llama(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "config.json").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "link"}


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="out: no space left: the weights need 0 MB, 0 MB are free") as caught:
        sparsekern.save(tiny.llama(), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "9:99", "", None])
def test_unknown_formats(tmp_path, format):
    with pytest.raises(ValueError, match=f"format: expected 'dense', 'packed', 'bitmask' or 'N:M', got {format!r}"):
        sparsekern.save(tiny.llama(), tmp_path / "out", format=format)


def test_only_a_transformers_model_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        sparsekern.save(torch.nn.Linear(2, 2), tmp_path / "out")
