"""The output folder of a run: what is refused before the work, what a finished one holds, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparsekern
from sparsekern import COPAL, BlockTuning, Distill, Gradual, KPrune, Report, prune_continually
from sparsekern.pruning import saving
from sparsekern.pruning.checkpoint import Checkpoint
from sparsekern.runtime import output, weight_bytes
from tests import encoders, tiny

QUIET = {"progress": False}
IDS = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "report.html", "report.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def prune(model, out, method="magnitude", **more):
    return sparsekern.prune(model, method, "2:4", IDS, out=out, **{**QUIET, **more})


def continue_with(model, out, **more):
    return prune_continually(model, {"a": IDS}, COPAL(), out=out, **{**QUIET, **more})


RUNS = pytest.mark.parametrize("run", [prune, continue_with])


def names(folder) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def untouched(model) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny.llama().state_dict().values(), strict=True))


@RUNS
def test_a_finished_folder_holds_everything(tmp_path, run):
    model, inode = tiny.llama(), tmp_path.stat().st_ino
    report = run(model, tmp_path, tokenizer=tiny.tokenizer())
    assert names(tmp_path) - {"special_tokens_map.json"} == FILES | TOKENIZER and tmp_path.stat().st_ino == inode
    assert len({stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path)("the fox")["input_ids"] == tiny.tokenizer()("the fox")["input_ids"]
    assert Report.from_json(tmp_path / "report.json") == report
    assert report.size["saved"] == (tmp_path / "model.safetensors").stat().st_size
    card = (tmp_path / "README.md").read_text()
    assert "| patterns |" not in card and "| seed | 0 |" in card and "| weights | " in card
    assert f"| method | {report.settings['method']['name']} (" in card


def test_without_a_tokenizer_and_packed(tmp_path):
    report = prune(tiny.llama(), tmp_path / "out", format="packed")
    assert names(tmp_path / "out") == FILES and "import sparsekern" in (tmp_path / "out" / "README.md").read_text()
    assert report.size["saved"] < report.size["dense"]


def refuses_sampling(model):
    model.generation_config.temperature = 0.6


def sets_a_length(model):
    model.config.max_length = 50


def ties_weights(model):
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight


@RUNS
@pytest.mark.parametrize(
    ("spoil", "reason"), [(refuses_sampling, "temperature"), (sets_a_length, "max_length"), (ties_weights, "shared tensors")]
)
def test_what_transformers_refuses_to_save_is_refused_first(tmp_path, run, spoil, reason):
    model = tiny.llama()
    spoil(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"model: expected one that transformers can save; it says: .*{reason}"):
        run(model, tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not (tmp_path / "out").exists()


class Unsaveable:
    def save_pretrained(self, folder):
        raise Exception("no vocabulary")  # as the tokenizers package raises them


@RUNS
@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (Unsaveable(), ValueError, "tokenizer: expected one that transformers can save; it says: no vocabulary"),
        ("gpt2", TypeError, "tokenizer: expected one with save_pretrained, got str"),
    ],
)
def test_a_tokenizer_that_cannot_be_saved_is_refused_first(tmp_path, run, tokenizer, error, message):
    model = tiny.llama()
    with pytest.raises(error, match=message):
        run(model, tmp_path / "out", tokenizer=tokenizer)
    assert untouched(model) and not (tmp_path / "out").exists()


@RUNS
def test_folders_that_cannot_be_written_to_are_refused_first(tmp_path, run, monkeypatch):
    model = tiny.llama()
    for path, error, message in (
        (os.fsdecode(b"caf\xe9"), ValueError, "out: expected a path in UTF-8"),
        ("", ValueError, "out: expected the path of a folder, got an empty one"),
        (tmp_path / ("a" * 300), OSError, "out: .*a{300}. cannot be a folder .File name too long"),
    ):
        with pytest.raises(error, match=message):
            run(model, path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="out: no space left: expected") as caught:
        run(model, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and untouched(model) and not (tmp_path / "out").exists()


WEIGHTS, PARAMETERS = weight_bytes(tiny.llama()), sum(parameter.numel() for parameter in tiny.llama().parameters())


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("magnitude", 2 * WEIGHTS),
        ("random", 2 * WEIGHTS),
        (Gradual(steps=1, train_steps=0), WEIGHTS),
        (Gradual(steps=1, train_steps=1), WEIGHTS + 2 * 13 * PARAMETERS),
    ],
    ids=["magnitude", "random", "gradual", "gradual, training"],
)
def test_room_is_needed_for_the_checkpoint_too(tmp_path, monkeypatch, method, needed):
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            prune(tiny.llama(), tmp_path / "out", method)
        else:
            with pytest.raises(OSError, match="out: no space left"):
                prune(tiny.llama(), tmp_path / "out", method)


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
@pytest.mark.parametrize(
    "options",
    [{"tune": BlockTuning(passes=1, blocks=2)}, {"distill": Distill(steps=1)}, {"distill": Distill(steps=1), "values": "int4"}],
    ids=["two blocks", "distill", "distill int4"],
)
def test_all_that_the_checkpoint_holds_is_counted(options, tmp_path, monkeypatch):
    """The state of training is written beside the one before it."""
    counted = []
    monkeypatch.setattr(saving, "check_space", lambda model, path, extra: counted.append(extra))
    monkeypatch.setattr(saving, "write_model", fails)
    model = tiny.llama(8)  # whose embeddings, which are counted and not kept, are small
    with pytest.raises(OSError, match="could not be saved"):
        sparsekern.prune(model, "wanda", "2:4", torch.cat([IDS] * 6) % 8, out=tmp_path / "out", progress=False, **options)
    held = {file.stem: load_file(file) for file in (tmp_path / "out" / "checkpoint").glob("*.safetensors")}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in held.items()}
    needed = sum(sizes.values()) + sizes.get("distillation", 0)
    assert needed <= counted[0] < 1.5 * needed


def test_what_the_checkpoint_holds_needs_no_more_room(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not be saved"):
        patch.setattr(saving, "write_model", fails)
        prune(tiny.llama(), tmp_path / "out")
    held = sum(file.stat().st_size for file in (tmp_path / "out" / "checkpoint").glob("*.safetensors"))
    usage, size = shutil.disk_usage(tmp_path), WEIGHTS
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - held - 1))
    with pytest.raises(OSError, match="out: no space left"):
        prune(tiny.llama(), tmp_path / "out", resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - held))
    assert prune(tiny.llama(), tmp_path / "out", resume=True).resumed_blocks == 3


def fails(*arguments):
    raise OSError(errno.EIO, "Input/output error")


def test_a_failure_at_the_end_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"resume=True \(--resume\) needs only to save it") as caught:
        patch.setattr(saving, "write_model", fails)
        prune(tiny.llama(), tmp_path / "out")
    assert caught.value.errno == errno.EIO and names(tmp_path / "out") == {"checkpoint"}
    assert prune(tiny.llama(), tmp_path / "out", resume=True).resumed_blocks == 3


class Killed(BaseException):
    """Ends a call where a signal would have killed it."""


def test_killed_before_the_checkpoint_is_gone_it_is_finished(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*arguments, **more):
        raise Killed

    remove = output.OutputFolder.remove

    def killed_amid(*arguments):
        with monkeypatch.context() as inside:
            inside.setattr(output.shutil, "rmtree", killed)
            remove(*arguments)

    for kill in (killed, killed_amid):
        with monkeypatch.context() as patch:
            patch.setattr(output.OutputFolder, "remove", kill)
            with pytest.raises(Killed):
                prune(tiny.llama(), out)
        assert names(out) > FILES
        for resume in (True, False):
            model = tiny.llama()
            with pytest.raises(FileExistsError, match="out: .* holds a finished run, so there is nothing to resume"):
                prune(model, out, resume=resume)
            assert untouched(model) and names(out) == FILES
        shutil.rmtree(out)


@pytest.mark.parametrize("moved", range(6))
def test_killed_amid_the_moves_it_is_finished_by_the_next_call(tmp_path, monkeypatch, moved):
    out, move, left = tmp_path / "out", output._replace, [moved]

    def killed(source, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        move(source, target)

    model = tiny.llama()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(output, "_replace", killed)
        prune(model, out)
    assert not (out / "config.json").exists()
    with pytest.raises(FileExistsError, match="holds a finished run"):
        prune(tiny.llama(), out, resume=True)
    assert names(out) == FILES
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("others", [["config.json", "report.json"], []])
def test_a_checkpoint_of_another_program_is_left_alone(tmp_path, others, resume):
    files = {tmp_path / name for name in [*others, "checkpoint/weights.pt", "checkpoint/.weights.tmp", "checkpoint/.1.123.tmp"]}
    (tmp_path / "checkpoint").mkdir()
    for file in files:
        file.write_bytes(b"{}")
    with pytest.raises((FileExistsError, ValueError), match="holds an? (un)?finished run|holds no state.json"):
        prune(tiny.llama(), tmp_path, resume=resume)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files


def test_killed_while_it_stages_it_is_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(model, folder, *more):
        (folder / ".tmpXy12Zw").write_bytes(b"half of the weights")
        patch.setattr(output.shutil, "rmtree", lambda *a, **k: None)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving, "write_model", killed)
        prune(tiny.llama(), out)
    assert (out / output.STAGING / ".tmpXy12Zw").exists()
    assert prune(tiny.llama(), out, resume=True).resumed_blocks == 3
    assert names(out) == FILES


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    """The second is refused at once, whatever it is, and the first is not disturbed."""
    out, refused = tmp_path / "out", []
    save = Checkpoint.save

    def meanwhile(self, index, result):
        for run in (prune, continue_with, lambda model, path: sparsekern.save(model, path)):
            model = tiny.llama()
            with pytest.raises((ValueError, FileExistsError), match="is in use by another process or call|holds") as error:
                run(model, out)
            refused.append(str(error.value))
            assert untouched(model)
        with pytest.raises(ValueError, match="out: .*out is in use by another process or call; wait until it is done"):
            prune(tiny.llama(), out, resume=True)
        save(self, index, result)

    monkeypatch.setattr(Checkpoint, "save", meanwhile)
    prune(tiny.llama(), out)
    assert len(refused) == 9 and names(out) == FILES


def test_threads_that_prune_into_one_folder(tmp_path):
    done, refused, begin = [], [], threading.Barrier(4)

    def work():
        model = tiny.llama()
        begin.wait()
        try:
            done.append(prune(model, tmp_path / "out"))
        except (ValueError, FileExistsError) as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and len(refused) == 3 and names(tmp_path / "out") == FILES


def test_no_failed_run_leaves_its_folder(tmp_path):
    with pytest.raises(ValueError, match="calibration"):
        sparsekern.prune(tiny.llama(), "sparsegpt", "2:4", out=tmp_path / "deep" / "out", **QUIET)
    assert not list(tmp_path.iterdir())


def test_results_can_be_added_to_a_finished_folder(tmp_path):
    model, out = tiny.llama(), tmp_path / "out"
    report = prune(model, out)
    report.command, report.measured = "sparsekern prune it", {"perplexity, pruned": float("inf")}
    saving.rewrite_reports(out, model, report, settings={"model": "it"})
    again = Report.from_json(out / "report.json")
    assert again == report and again.measured["perplexity, pruned"] == float("inf") and names(out) == FILES
    card = (out / "README.md").read_text()
    assert "sparsekern prune it" in card and "| perplexity, pruned | inf |" in card and "| model | it |" in card
    with pytest.raises(FileExistsError, match="out: expected a folder with a finished run, got"):
        saving.rewrite_reports(tmp_path / "other", model, report)


def test_a_removal_leaves_a_folder_that_names_its_loader(tmp_path):
    model = encoders.tiny("bert")
    sparsekern.prune(model, KPrune(remove=0.3), None, [encoders.padded_ids()], out=tmp_path / "out", **QUIET)
    assert "sparsekern.load(" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparsekern"
    for load in (sparsekern.load, AutoModel.from_pretrained):
        encoders.assert_same_weights(load(tmp_path / "out"), model)


def test_a_report_with_an_infinite_error_is_written(tmp_path, monkeypatch):
    from sparsekern.reports.report import LayerReport

    model, out = tiny.llama(), tmp_path / "out"
    report = prune(model, out)
    layers = [LayerReport(**{**vars(layer), "error": float("inf")}) for layer in report.layers]
    report.layers[:] = layers
    saving.rewrite_reports(out, model, report)
    assert Report.from_json(out / "report.json").layers == layers
