"""What `python -m bench.gpu` asks of the compiler, compute-sanitizer and cuSPARSELt, without a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import cases, checks
from bench.gpu.budget import Budget


def test_the_build_is_for_this_device_alone(monkeypatch, tmp_path):
    """An image may ask for seven architectures, and ninja may lie beside Python only."""
    asked = {}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;8.0;9.0+PTX")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(checks, "run", lambda command, log, seconds, environment: asked.update(environment) or 0)
    assert checks.build(Budget(60), tmp_path / "log") is None
    assert asked["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert asked["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_races_are_looked_for_first_and_in_our_kernels_only(monkeypatch, tmp_path):
    commands = []

    def run(command, log, seconds, environment):
        commands.append([str(part) for part in command])
        with open(log, "a") as file:
            file.write("ran 3 calls\n")
        return 0

    monkeypatch.setattr(checks, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(checks, "run", run)
    rows = checks.sanitizers(Budget(300), tmp_path / "log")
    assert [command[2] for command in commands if command[-1] == "cuda"] == ["racecheck", "memcheck"]
    assert commands[0][2] == "racecheck"
    assert len(rows) == len(commands) and all(row.met for row in rows)
    for command in commands:
        filters = [command[i + 1] for i, part in enumerate(command) if part == "--kernel-name"]
        # A part of Triton's names, such as `step`, would be one of torch's too.
        assert filters == ["kns=sparsekern"] if command[-1] == "cuda" else all(name.startswith("kne=") for name in filters)


def test_the_names_of_triton_kernels_are_those_in_their_machine_code():
    triton_build = pytest.importorskip("tests.native.triton_build")
    kernels = {case.kernel.__name__ for case in triton_build.shipped(triton_build.ARCHITECTURES[1])}
    assert kernels <= {name.removeprefix("kne=") for name in checks.kernel_filters("triton")}


@pytest.mark.parametrize("tokens", [1, 8])
def test_cusparselt_is_asked_for_whole_vectors_of_tokens(monkeypatch, tokens):
    """It refuses fewer than eight, with an error that looks like a lost device."""
    place = SimpleNamespace(device=torch.device("cuda"), randn=lambda *shape, dtype: torch.randn(shape, dtype=dtype))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cases, "best_plan", lambda weight, x: lambda: None)
    assert (cases.BEST_PLAN in cases.linear(place, tokens, 64, 64).baselines) == (tokens == 8)
