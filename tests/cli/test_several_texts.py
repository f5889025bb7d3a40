"""The command line for several texts, which a model is pruned for one after another."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekern.cli import continual as several
from sparsekern.cli import main
from sparsekern.cli import prune as one_text
from sparsekern.pruning.blockwise import loop
from tests import tiny
from tests.cli.conftest import exit_code


def test_several_texts_one_after_another(model, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(tiny.TEXT.split())))
    given = ["prune", model, "--method", "copal", "--pattern", "0.5", "--samples", "4", "--length", "32"]
    both = ["--calibration", text, "--calibration", str(other)]
    assert (
        main([*given, *both, "--evaluate", "--text", text, "--text", str(other), "--windows", "2", "--out", str(tmp_path / "a")])
        == 0
    )
    printed = capsys.readouterr().out
    for line in (
        "backward transfer",
        "average perplexity",
        "mask changed",
        f"evaluated on 2 x 64 tokens of {other}",
        "from_pretrained",
    ):
        assert line in printed
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    results = report["results"]
    assert results["names"] == [text, str(other)] and results["backward_transfer"] is not None and report["run"]["versions"]
    assert "one after another" in (tmp_path / "a" / "README.md").read_text()

    state = ["--state", str(tmp_path / "state")]
    assert main([*given, "--calibration", text, *state, "--out", str(tmp_path / "b")]) == 0
    assert main([*given, "--calibration", str(other), *state, "--out", str(tmp_path / "c")]) == 0
    once, later = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ac")
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), later.parameters(), strict=True))
    assert main([*given, "--calibration", text, *state, "--out", str(tmp_path / "d")]) == 1
    assert "was used already" in capsys.readouterr().err
    assert main([*given, "--calibration", text, *state, "--abandon", "--out", str(tmp_path / "d")]) == 1
    assert "holds no unfinished step" in capsys.readouterr().err


def test_several_texts_packed(prune, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(tiny.TEXT[::-1])
    assert prune("--calibration", str(other), "--method", "copal", "--format", "2:4") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[0].mlp.up_proj.format == "2:4"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox")["input_ids"] == tiny.tokenizer()("the fox")["input_ids"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--calibration", "a.txt", "--calibration", "a.txt"], "--calibration: a.txt is given twice"),
        (["--state", "state", "--report-error"], "--report-error: expected one --calibration and no --state"),
        (["--state", "state", "--distill", "5"], "--distill: expected one --calibration and no --state"),
        (["--state", "state", "--tune"], "--tune: expected one --calibration and no --state"),
        (["--calibration", "a.txt", "--resume"], "--resume: expected --state, the folder of the run to continue"),
        (["--abandon"], "--abandon: expected --state, the folder with the unfinished step"),
        (["--calibration", "a.txt", "--abandon"], "--abandon: expected --state, the folder of the run to continue"),
        (["--state", "state", "--abandon", "--resume"], "--abandon: expected no --resume with it"),
        (["--calibration", "a.txt", "--strategy", "x"], "--strategy: expected one of accumulate, dense, carry, got 'x'"),
        (["--calibration", "a.txt", "--method", "kprune"], "method: expected one of alps, copal, "),
        (["--state", "state", "--evaluate"], "--text: expected one for each --calibration, in the same order"),
        (["--strategy", "carry"], "--strategy: expected more than one --calibration, or --state"),
        (["--text", "a.txt", "--text", "b.txt"], "--text: expected one for one --calibration, got 2"),
    ],
)
def test_wrong_calls_about_several_texts(prune, capsys, arguments, message):
    assert exit_code(prune, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1  # no model was loaded


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ((), "run the same command with --resume to go on"),
        (("--state", "{}"), "run the same command with --resume to go on"),
        (("--state", "{}", "--abandon"), "run the same command with --resume in place of --abandon to go on"),
        (("--calibration", "{}.txt"), "nothing was kept; with --state DIR a run can be resumed"),
    ],
)
def test_what_can_be_done_after_ctrl_c(prune, tmp_path, monkeypatch, capsys, arguments, hint):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for module in (one_text, several):
        monkeypatch.setattr(module, "load_tokenizer_of", stop)
    given = [word.format(tmp_path / "other") for word in arguments]
    assert prune(*given) == 130
    assert capsys.readouterr().err == f"sparsekern prune: interrupted; {hint}\n"
    monkeypatch.undo()
    if "--resume" in hint and "--abandon" not in arguments:  # of which there is nothing to drop here
        assert prune(*given, "--resume") == 0


def test_a_run_with_a_state_goes_on_as_the_hint_says(prune, text, tmp_path, monkeypatch, capsys):
    def stop_at_the_last_block(run, index, linears, original=loop.BlockLoop._prune_block):
        if index == 2:
            raise KeyboardInterrupt
        original(run, index, linears)

    given = ("--method", "copal", "--state", str(tmp_path / "state"))
    with monkeypatch.context() as patch:
        patch.setattr(loop.BlockLoop, "_prune_block", stop_at_the_last_block)
        assert prune(*given) == 130
    assert "run the same command with --resume to go on" in capsys.readouterr().err
    assert prune(*given) == 1
    assert prune(*given, "--resume") == 0
