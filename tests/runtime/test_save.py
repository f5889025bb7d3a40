"""`save`: what it writes, and what it refuses before it writes."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparsekern
from sparsekern.runtime import output
from tests import encoders, tiny


def names(folder) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_plain_transformers_loads_what_was_saved(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    path = sparsekern.save(model, tmp_path / "a" / "b", tokenizer=tiny.tokenizer())
    again = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("the fox")["input_ids"] == tiny.tokenizer()("the fox")["input_ids"]
    assert f"| sparsekern | {sparsekern.__version__} |" in (path / "README.md").read_text()
    assert names(path.parent) == {"b"} and not any(name.startswith(".") for name in names(path))


def test_an_empty_folder_is_taken_and_stays_the_same_folder(tmp_path):
    """A mount point or the current folder cannot be replaced, and a shared folder would lose its group."""
    (tmp_path / "lost+found").mkdir()
    inode = tmp_path.stat().st_ino
    sparsekern.save(tiny.llama(), tmp_path)
    assert (tmp_path / "config.json").exists() and tmp_path.stat().st_ino == inode


def test_the_current_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sparsekern.save(tiny.llama(), ".") == tmp_path
    assert AutoModelForCausalLM.from_pretrained(".").config.vocab_size == 320


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_have_the_mode_of_the_umask(tmp_path, umask, mode):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2775)
    before = os.umask(umask)
    try:
        sparsekern.save(tiny.llama(), folder, tokenizer=tiny.tokenizer())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2775


def test_what_is_there_is_never_overwritten_unasked(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds something else \(a, b, c, …\); name a new or empty one$"):
        sparsekern.save(tiny.llama(), tmp_path)
    with pytest.raises(FileExistsError, match="path: '.*a' is a file, expected a folder"):
        sparsekern.save(tiny.llama(), tmp_path / "a")
    with pytest.raises(FileExistsError, match="path: '.*a' is a file, expected a folder"):
        sparsekern.save(tiny.llama(), tmp_path / "a" / "below")
    with pytest.raises(FileExistsError, match="already holds something else"):  # no model either
        sparsekern.save(tiny.llama(), tmp_path, overwrite=True)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["mine"] * 4


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path):
    old, new = tiny.llama(), tiny.llama(num_hidden_layers=2)
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name in ("report.json", "report.html", "notes.txt"):
        (tmp_path / name).write_text("old")
    sparsekern.save(new, tmp_path, overwrite=True)
    assert names(tmp_path) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values(), strict=True))
    sparsekern.save(old, tmp_path / "new", overwrite=True)
    assert (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(("name", "what"), [("adapter_config.json", "an adapter"), ("checkpoint", "an unfinished run")])
def test_overwriting_spares_what_is_no_finished_model(tmp_path, name, what):
    sparsekern.save(tiny.llama(), tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {what} .*, which is not overwritten"):
        sparsekern.save(tiny.llama(), tmp_path, overwrite=True)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = tiny.llama()

    def fails(path):
        (path / "model.safetensors").write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left on device"):
        sparsekern.save(model, tmp_path / "a" / "out")
    assert not list(tmp_path.iterdir())


def test_overwriting_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    old, new = tiny.llama(), tiny.llama(num_hidden_layers=2)
    sparsekern.save(old, tmp_path)

    def fails(path):
        (path / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(new, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left on device"):
        sparsekern.save(new, tmp_path, overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), again.state_dict().values(), strict=True))


class Killed(BaseException):
    """Ends a call where a signal would have killed it."""


@pytest.mark.parametrize("moved", range(5))
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_amid_the_moves_it_is_never_a_mixture(tmp_path, monkeypatch, moved, overwrite):
    """Whatever was moved before the kill, the folder is whole or has no config, and the next call finishes it."""
    old, new, out = tiny.llama(), tiny.llama(num_hidden_layers=2), tmp_path / "out"
    if overwrite:
        sparsekern.save(old, out)
    move, left = output._replace, [moved]

    def killed(source, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(output, "_replace", killed)
        if moved < 4:
            with pytest.raises(Killed):
                sparsekern.save(new, out, overwrite=overwrite)
            assert not (out / "config.json").exists()
        else:
            sparsekern.save(new, out, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="name a new or empty one, or pass overwrite=True to replace the model in it$"):
        sparsekern.save(old, out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values(), strict=True))
    assert names(out) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_overwriting_spares_a_folder_that_is_named_like_a_file_of_weights(tmp_path):
    sparsekern.save(tiny.llama(), tmp_path)
    (tmp_path / "other.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nothing")
    sparsekern.save(tiny.llama(), tmp_path, overwrite=True)
    assert (tmp_path / "other.safetensors").is_dir() and not (tmp_path / "link.safetensors").is_symlink()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / output.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="^.*path: .*out cannot be written to") as caught:
        sparsekern.save(tiny.llama(), tmp_path / "out")
    assert caught.value.errno == errno.ELOOP and not (tmp_path / "elsewhere").exists()


def test_what_a_killed_save_left_goes(tmp_path):
    for name in (output.STAGING, output.REMOVED):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmp5CMSnJ").write_text("half a model")
    (tmp_path / output.LOCK).touch()
    sparsekern.save(tiny.llama(), tmp_path)
    assert names(tmp_path) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    sparsekern.save(tiny.llama(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "config.json").exists()
    assert names(tmp_path) == {"folder", "link"}


def test_everything_is_on_disk_before_the_config_is_in_place(tmp_path, monkeypatch):
    """Or else a power cut could leave a folder that looks whole."""
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(descriptor):
        done.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def replacing(source, target):
        done.append(("move", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    sparsekern.save(tiny.llama(), tmp_path)
    files = {entry.name: entry.stat().st_ino for entry in tmp_path.iterdir()}
    for name, inode in files.items():
        assert done.index(("sync", inode)) < done.index(("move", inode)), name
    assert max(done.index(("move", inode)) for inode in files.values()) == done.index(("move", files["config.json"]))
    assert done[-1] == ("sync", tmp_path.stat().st_ino)


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="path: no space left: expected 0 MB for the weights, got 0 MB that are free") as caught:
        sparsekern.save(tiny.llama(), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_named_as_such(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    model = tiny.llama()
    for number in (errno.ENOSPC, errno.EDQUOT):

        def fails(path, number=number):
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

        monkeypatch.setattr(model, "save_pretrained", fails)
        with pytest.raises(OSError, match="I/O error") as caught:
            sparsekern.save(model, tmp_path / "out")
        assert caught.value.errno == number and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_or_written_to(tmp_path, monkeypatch):
    if os.path.isdir("/proc/self"):
        with pytest.raises(OSError, match="path: the folder '/proc/sparsekern/out' cannot be made"):
            sparsekern.save(tiny.llama(), "/proc/sparsekern/out")
    opened = os.open

    def read_only(path, *arguments, **keywords):
        if os.fspath(path).endswith(output.LOCK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="path: .*out cannot be written to .Read-only file system"):
        sparsekern.save(tiny.llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, "path: expected the path of a folder, got an empty one"),
        (3, TypeError, "path: expected the path of a folder, got 3"),
        ("a\0b", ValueError, "path: expected the path of a folder, got 'a.x00b'"),
        ("~nobody-of-that-name/x", ValueError, "path: expected the path of a folder, got '~nobody-of-that-name/x'"),
        (os.fsdecode(b"caf\xe9"), ValueError, r"path: expected a path in UTF-8, got b'caf\\xe9'"),
    ],
)
def test_paths_that_are_none(path, error, message):
    with pytest.raises(error, match=message):
        sparsekern.save(tiny.llama(), path)


@pytest.mark.parametrize("format", ["onnx", "9:99", "", None])
def test_unknown_formats(tmp_path, format):
    with pytest.raises(ValueError, match=f"format: expected 'dense', 'packed', 'bitmask', 'N:M' or 'N:M-q4', got {format!r}"):
        sparsekern.save(tiny.llama(), tmp_path / "out", format=format)


def test_only_a_transformers_model_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        sparsekern.save(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(TypeError, match="tokenizer: expected one with save_pretrained, got str"):
        sparsekern.save(tiny.llama(), tmp_path / "out", tokenizer="gpt2")
    assert not list(tmp_path.iterdir())


def test_a_refusal_without_a_message_is_told_by_its_type(tmp_path):
    class Silent:
        def save_pretrained(self, folder):
            raise NotImplementedError

    with pytest.raises(ValueError, match="tokenizer: expected one that transformers can save; it says: NotImplementedError"):
        sparsekern.save(tiny.llama(), tmp_path / "out", tokenizer=Silent())
    assert not list(tmp_path.iterdir())


def test_what_transformers_refuses_to_save_is_named(tmp_path):
    model = tiny.llama()
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="model: expected one that transformers can save; it says: .*temperature"):
        sparsekern.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_threads_that_save_to_one_path(tmp_path):
    """One of them makes the folder, whole; the others are refused by name."""
    models = [tiny.llama() for _ in range(6)]
    for index, model in enumerate(models):
        with torch.no_grad():
            model.lm_head.weight.fill_(index)
    saved, refused, begin = [], [], threading.Barrier(len(models))

    def work(index):
        begin.wait()
        try:
            sparsekern.save(models[index], tmp_path / "deep" / "out", tokenizer=tiny.tokenizer())
            saved.append(index)
        except (ValueError, FileExistsError) as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(saved) == 1 and len(refused) == 5
    assert all("is in use by another process or call" in said or "already holds" in said for said in refused)
    assert (sparsekern.load(tmp_path / "deep" / "out").lm_head.weight == saved[0]).all()


def test_a_folder_in_use_is_refused_at_once(tmp_path):
    with output.OutputFolder.held(tmp_path / "out"):
        with pytest.raises(ValueError, match="path: .*out is in use by another process or call; wait until it is done"):
            sparsekern.save(tiny.llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def cut_encoder(name: str):
    from sparsekern.models.encoder import Encoder
    from sparsekern.models.units import keep_units, record_units

    encoder = Encoder(encoders.tiny(name))
    with torch.no_grad():
        for number, sublayer in enumerate(encoder.sublayers):
            keep_units(sublayer, torch.arange(number % sublayer.units))  # the first has none left
        record_units(encoder)
    return encoder.model


@pytest.mark.parametrize("name", ["bert", "distilbert", "bert_regression"])
def test_plain_transformers_loads_a_cut_encoder(tmp_path, name):
    """Once sparsekern is imported; and the model is an ordinary one then."""
    model, batch = cut_encoder(name), encoders.padded_ids()
    path = sparsekern.save(model, tmp_path / "out")
    for load in (type(model).from_pretrained, sparsekern.load):
        again = load(path)
        assert type(again) is type(model) and not hasattr(again.config, "quantization_config") and not again.is_quantized
        encoders.assert_same_weights(again, model)
    assert AutoModel.from_pretrained(path)(**batch)[0].isfinite().all()
    again.save_pretrained(tmp_path / "plain")
    encoders.assert_same_weights(sparsekern.load(tmp_path / "plain"), model)
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "sparsekern", "version": 1, "layers": {}}


def test_without_sparsekern_a_cut_encoder_names_it(tmp_path):
    path = sparsekern.save(cut_encoder("bert"), tmp_path / "out")
    script = f"import transformers; transformers.AutoModel.from_pretrained({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode and "sparsekern" in done.stderr


@pytest.mark.parametrize(
    "units",
    [
        3,
        {"heads": [1], "neurons": [1] * 3},
        {"heads": [-1, 2, 2], "neurons": [1] * 3},
        {"heads": [1] * 3, "neurons": [9**9, 1, 1]},
        {},
    ],
)
def test_sizes_that_cannot_be_are_refused_by_plain_transformers_too(tmp_path, units):
    path = sparsekern.save(cut_encoder("bert"), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "sparsekern_units": units}))
    with pytest.raises(ValueError, match="sparsekern_units.(heads|neurons) in config.json: expected 3 whole numbers"):
        AutoModel.from_pretrained(path)
