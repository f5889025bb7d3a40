"""What the command line says of arguments that make no sense: one line that names the option, and the exit code."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings

import pytest

from sparsekern import SparsekernWarning
from sparsekern.cli import common, evaluate, main, ranks
from sparsekern.methods import METHODS
from tests.cli.conftest import exit_code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "obc"], f"--method: expected one of {', '.join(sorted(METHODS))}, got 'obc'"),
        (["--help-method", "obc"], f"--help-method: expected one of {', '.join(sorted(METHODS))}, got 'obc'"),
        (["--pattern", "4:2"], "--pattern: expected N:M with 1 <= N < M, which keeps N of every M weights, got '4:2'"),
        (["--pattern", "0:4"], "--pattern: expected N:M with 1 <= N < M, which keeps N of every M weights"),
        (["--pattern", "1.5"], "--pattern: expected a sparsity of at least 0 and below 1, got 1.5"),
        (["--pattern=-0.1"], "--pattern: expected a sparsity of at least 0 and below 1, got -0.1"),
        (["--pattern", "half"], "--pattern: expected 'N:M' (keep N of every M) or a sparsity such as 0.5, got 'half'"),
        (["--pattern-for", "2:4"], "--pattern-for: expected GLOB=PATTERN, got '2:4'"),
        (["--pattern-for", "*=4:4"], "--pattern-for: expected N:M with 1 <= N < M, which keeps N of every M weights"),
        (["--pattern-for", "=2:4"], "--pattern-for: expected GLOB=PATTERN, got '=2:4'"),
        (["--method", "kprune", "--pattern", "0.5"], "--pattern: expected none, since kprune removes a share of heads and neurons"),
        (["--method", "kprune", "--evaluate"], "--evaluate: perplexity is of causal language models, which kprune does not"),
        (["--method", "kprune", "--set", "remove=1"], "KPrune.remove: expected a number of at least 0 and below 1, got 1.0"),
        (["--weighting", "gate"], "--weighting: expected one of equal, routing, got 'gate'"),
        (["--unseen", "drop"], "--unseen: expected one of magnitude, dense, error, got 'drop'"),
        (["--remove", "0.5"], "--remove: expected --method experts or kprune, got sparsegpt, which makes weights zero"),
        (["--method", "experts", "--remove", "a"], "--remove: expected a share such as 0.25, got 'a'"),
        (["--method", "experts", "--remove", "1"], "ExpertPruning.remove: expected a number above 0 and below 1, got 1.0"),
        (["--method", "experts", "--remove", "0.5", "--set", "remove=0.25"], "--set: remove is given twice"),
        (
            ["--method", "experts", "--pattern", "2:4"],
            "--pattern: expected none, since experts removes a share of experts, given by",
        ),
        (["--then", "wanda"], "--then: expected --method experts, got sparsegpt"),
        (["--method", "experts", "--set", "then.damping=1"], "--set: expected --then, the method of the setting then.damping"),
        (["--method", "experts", "--then", "wanda", "--set", "then.a=1"], "--set: the method wanda has no setting 'a', only none"),
        (["--state", "~nobody-of-this-name/a"], "--state: expected a path, got '~nobody-of-this-name/a', whose home folder is not"),
        (["--set", "damping"], "--set: expected NAME=VALUE, got 'damping'"),
        (["--set", "=3"], "--set: expected NAME=VALUE, got '=3'"),
        (["--set", "rho=1"], "--set: the method sparsegpt has no setting 'rho', only damping, block_size, scope, mask"),
        (["--method", "wanda", "--set", "rho=1"], "--set: the method wanda has no setting 'rho', only none"),
        (["--method", "wanda", "--set", "solver.rho=1"], "--set: the method wanda has no setting 'solver.rho', only none"),
        (
            ["--method", "gradual", "--set", "scope=row"],
            "--set: the method gradual has no setting 'scope', only criterion, steps, schedule, ",
        ),
        (
            ["--method", "gradual", "--set", "criterion.units=heads"],
            "--set: the criterion magnitude of gradual has no setting 'units', only scope",
        ),
        (["--method", "sparsellm", "--set", "gate.damping=1"], "--set: the method sparsellm has no setting 'gate.damping', only"),
        (["--method", "sparsellm", "--set", "solver.=1"], "--set: the method sparsellm has no setting 'solver.', only"),
        (["--method", "gradual", "--set", "steps=0"], "Gradual.steps: expected a whole number of at least 1, got 0"),
        (
            ["--method", "gradual", "--set", "criterion=wanda"],
            "Gradual.criterion: expected one of 'magnitude', 'random', 'structured', got",
        ),
        (
            ["--method", "gradual", "--set", "criterion=wanda", "--set", "criterion.scope=row"],
            "Gradual.criterion: expected one of 'magnitude', 'random', 'structured', got",
        ),
        (["--method", "sparsellm", "--set", "solver=kprune"], "SparseLLM.solver: expected a method that solves one linear"),
        (["--method", "sparsellm", "--set", "solver=obc"], "SparseLLM.solver: method: expected one of"),
        (["--method", "alps", "--set", "rho=big"], "--set rho: expected a number above 0, got 'big'"),
        (
            ["--method", "sparsellm", "--set", "solver=alps", "--set", "solver.rho=big"],
            "--set solver.rho: expected a number above 0, got 'big'",
        ),
        (
            ["--method", "sparsellm", "--set", "iterations=2.5"],
            "--set iterations: expected a whole number of at least 1, got '2.5'",
        ),
        (["--method", "kprune", "--set", "tuning=yes"], "--set tuning: expected True or False, got 'yes'"),
        (["--method", "kprune", "--set", "mu=-1"], "KPrune.mu: expected a number above 0, got -1.0"),
        (["--method", "alps", "--set", "rho=1", "--set", "rho=2"], "--set: rho is given twice"),
        (["--method", "sparsellm", "--set", "solver.scope=row", "--set", "solver.scope=row"], "--set: solver.scope is given twice"),
        (["--method", "gradual", "--set", "criterion.scope=world"], "Magnitude.scope: expected one of 'matrix', 'row', 'global'"),
        (["--set", "damping=-1"], "SparseGPT.damping: expected a number of at least 0, got -1.0"),
        (["--set", "scope=world"], "SparseGPT.scope: expected one of 'block', 'row', 'matrix', got 'world'"),
        (["--format", "onnx"], "--format: expected 'dense', 'packed', 'bitmask', 'N:M' or 'N:M-q4', got 'onnx'"),
        (["--dtype", "int4"], "--dtype: expected one of auto, float32, bfloat16, float16, got 'int4'"),
        (["--device", "quantum"], "--device: expected auto, cpu or cuda[:N], got 'quantum'"),
        (["--device", "cuda:99"], "--device: expected a device that is available, got 'cuda:99': torch "),
        (["--device", "meta"], "--device: expected auto, cpu or cuda[:N], got 'meta', which holds no values"),
        (["--samples", "0"], "--samples: expected at least 1, got 0"),
        (["--samples", "many"], "--samples: expected a whole number, got 'many'"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--windows", "0"], "--windows: expected at least 1, got 0"),
        (["--length", "1.5"], "--length: expected a whole number, got '1.5'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 2**63 - 1, got -1"),
        (["--seed", "99999999999999999999"], "--seed: expected a whole number from 0 to 2**63 - 1, got 99999999999999999999"),
        (["--damping", "0.1"], "sparsekern: error: unrecognized arguments: --damping 0.1"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(prune, capsys, arguments, message):
    code = exit_code(prune, *arguments)
    error = capsys.readouterr().err
    assert code == 2 and error.removeprefix("sparsekern prune: error: ").startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--pattern", "3:5"],
            "model.layers.0.self_attn.q_proj: expected input features divisible by M=5 for pattern '3:5', got 32",
        ),
        (["--include", "*.nothing"], "include: '*.nothing' matches no linear of the model"),
        (["--length", "65"], "length: expected at most 64, the positions of this model, got 65"),
        (["--calibration", "gone.txt"], "text: no file 'gone.txt'"),
        (["--method", "kprune"], "model: expected an encoder"),
        (["--evaluate", "--text", "gone.txt"], "text: no file 'gone.txt'"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(prune, capsys, arguments, message):
    assert prune(*arguments) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"sparsekern prune: error: {message}") and len(error) == 2


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_of_other_packages_are_printed_where_a_user_can_act_on_them(monkeypatch, capsys, debug):
    def work():
        warnings.warn_explicit("too old a driver", UserWarning, "torch/cuda.py", 7)
        warnings.warn_explicit("use cache instead", FutureWarning, "torch/module.py", 9)
        warnings.warn_explicit("is deprecated", DeprecationWarning, "torch/module.py", 9)
        for _ in range(2):
            warnings.warn("stays dense", SparsekernWarning, stacklevel=1)

    monkeypatch.setattr(evaluate, "prepare", lambda arguments: work)
    assert main(["eval", "model", *(["--debug"] if debug else [])]) == 0
    printed = capsys.readouterr().err.splitlines()
    of_code = ["warning: torch/module.py:9: use cache instead"] if debug else []
    assert [line for line in printed if "is deprecated" not in line] == [
        "warning: torch/cuda.py:7: too old a driver",
        *of_code,
        "warning: stays dense",
        "warning: stays dense",
    ]
    assert debug or len(printed) == 3


def test_what_the_package_logs_is_printed_once(monkeypatch, capsys):
    logger = logging.getLogger("sparsekern")

    def work():
        logger.info("nothing to act on")
        logging.getLogger("sparsekern.backends").warning("the reference runs")

    monkeypatch.setattr(evaluate, "prepare", lambda arguments: work)
    handlers = list(logger.handlers)
    assert main(["eval", "model"]) == 0
    assert capsys.readouterr().err == "warning: the reference runs\n"
    assert logger.handlers == handlers


def test_the_bar_of_a_gguf_file_s_tensors_is_not_printed(monkeypatch, capsys):
    from transformers import modeling_gguf_pytorch_utils as gguf

    bar = gguf.tqdm
    monkeypatch.setattr(common, "load", lambda *_, **__: list(gguf.tqdm(range(200), desc="tensors")))
    arguments = argparse.Namespace(model="model.gguf", dtype="auto", device="cpu", trust_remote_code=False)
    assert len(common.load_model(arguments)) == 200
    assert capsys.readouterr().err == "loading model.gguf …\n"
    assert gguf.tqdm is bar


def test_a_rank_that_is_stopped_says_what_is_there_by_then(monkeypatch):
    said, ended, known = io.StringIO(), threading.Event(), ["run the same command again"]
    monkeypatch.setattr(sys, "__stderr__", said)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with ranks._told_to_stop(lambda: known[0]):
        known[0] = "the pruned model is complete"
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(60)
    assert said.getvalue() == "the pruned model is complete\n"
