"""The problems of ops, at toy sizes on the CPU: each op has one, its check passes, and fails for another result."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cpu, results
from bench.gpu import worker
from bench.ops import all_cases
from bench.problem import Case, NotHere, Place, Problem, Turns
from sparsekern import backends
from sparsekern.ops._registry import OPS

ROOT = Path(__file__).resolve().parents[2]
CASES = [(module, case) for module, cases in all_cases().items() for case in cases]

# Cases that differ in their real sizes alone are one problem at toy sizes.
TOYS: dict[object, list[Case]] = {}
for _, each in CASES:
    TOYS.setdefault((each.make, frozenset({**each.sizes, **each.toy}.items())), []).append(each)
# Ops that add to a tensor: their checks call them on a fresh one, as the timed one holds the sum of all calls.
ACCUMULATING = ("cross_gram_", "feature_norm_", "gram_", "sensitivity_")


def toy(case: Case) -> Problem:
    """Return the toy problem; skip the test if the op runs on a GPU alone."""
    try:
        return case.problem(Place(torch.device("cpu"), toy=True))
    except NotHere as reason:
        assert OPS[case.op].only_on_cuda
        pytest.skip(str(reason))


@pytest.mark.parametrize("op", OPS)
def test_the_name_of_an_op_finds_its_problems(op):
    own = all_cases()[f"bench_{op.rstrip('_')}"]
    assert OPS[op].only_on_cuda or any(case.cpu is not None for case in own)
    assert not backends.implementations(op) or any(case.cuda is not None and case.op == op for case in own)


def test_a_problem_stands_in_the_file_of_its_op():
    for module, case in CASES:
        assert case.op is None or module == f"bench_{case.op.rstrip('_')}", case.name


def test_names_are_unique_on_each_device():
    on_cpu = [comparison.name for _, case in CASES for comparison in case.comparisons()]
    assert len(set(on_cpu)) == len(on_cpu)
    assert len({case.name for _, case in CASES}) == len(CASES)
    on_device = {case.name for _, case in CASES if case.cuda is not None}
    assert on_device < set(worker.ordered())


@pytest.mark.parametrize("cases", TOYS.values(), ids=lambda cases: cases[0].name)
def test_the_right_result_passes_and_every_baseline_runs(cases):
    problem = toy(cases[0])
    problem.check(problem.calls[0]())
    assert problem.read or problem.flops or not problem.captured
    for name in {name for case in cases for name in (*(case.cpu or ()), *(case.cuda or ()))}:
        for call in problem.baselines[name]:
            try:
                call()
            except NotHere as reason:
                assert "AVX-512" in str(reason)


def corrupted(result):
    """Return a result of the same form with its first tensor wrong."""
    if isinstance(result, (tuple, list)):
        return type(result)([corrupted(result[0]), *result[1:]])
    return ~result if result.dtype == torch.bool else result * 2 + 1


@pytest.mark.parametrize("op", [None, *OPS])
def test_another_result_does_not_pass(op, monkeypatch):
    checked = set()
    for module, case in CASES:
        if case.op != op or (module, case.make) in checked:
            continue
        checked.add((module, case.make))
        if op in ACCUMULATING:
            owner = importlib.import_module(f"bench.ops.{module}")
            right = getattr(owner, op)
            monkeypatch.setattr(owner, op, lambda sums, *given, right=right: sums.copy_(corrupted(right(sums, *given))))
        problem = toy(case)
        with pytest.raises(AssertionError):
            problem.check(corrupted(problem.calls[0]()))
    assert checked


def test_a_problem_is_the_same_each_time():
    place = Place(torch.device("cpu"), toy=True)
    case = all_cases()["bench_nm_mask"][0]
    first = case.problem(place).calls[0]()
    assert torch.equal(first, case.problem(place).calls[0]())


def test_copies_exceed_the_caches_and_a_toy_has_one():
    assert len(Place(torch.device("cpu")).copies(2**26)) == 4 and len(Place(torch.device("cpu")).copies(2**30)) == 1
    assert len(Place(torch.device("cpu"), toy=True).copies(1)) == 1


def test_calls_take_turns():
    turns = Turns([lambda: "a", lambda: "b"])
    assert [turns() for _ in range(3)] == ["a", "b", "a"] and turns.result == "a"


def test_a_comparison_names_the_baseline_where_there_are_several():
    case = Case("gram", None, {}, {}, cpu={"plain": 2.0})
    assert [(each.name, each.goal) for each in case.comparisons()] == [("gram", 2.0)]
    case = Case("gram", None, {}, {}, cpu={"plain": 2.0, "public": None})
    assert [(each.name, each.goal) for each in case.comparisons()] == [("gram, against plain", 2.0), ("gram, against public", None)]
    assert [(each.name, each.goal) for each in Case("gram", None, {}, {}, cpu={}).comparisons()] == [("gram", None)]
    assert Case("gram", None, {}, {}, cuda={"plain": 2.0}).comparisons() == []


def test_a_rehearsal_on_the_cpu_makes_rows(tmp_path):
    file = tmp_path / "benchmarks.json"
    files = [f"bench/ops/bench_{name}.py" for name in ("gram_symmetrize", "reverse_cholesky", "alps")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rehearse", f"--benchmark-json={file}", *files]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # which times nothing
    done = subprocess.run([*command, "-k", "gram_symmetrize or 576"], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    rows = [cpu._row(benchmark) for benchmark in json.loads(file.read_text())["benchmarks"]]
    assert {row.what for row in rows} == {
        "gram_symmetrize_ 4096",
        *(f"reverse_cholesky 576, against {name}" for name in ("Cholesky, inverse, Cholesky", "Cholesky of the flipped matrix")),
        *(
            f"ALPS 1536x576 {pattern}, against {name}"
            for pattern in ("2:4", 0.5)
            for name in ("the public program", "a plain prototype")
        ),
    }
    (row,) = (row for row in rows if row.what == "gram_symmetrize_ 4096")
    assert row.against.startswith("tril() + tril(-1).T ") and row.goal == "" and row.met is None
    assert " of read_bandwidth" in row.reached and row.details["ratio"] > 0
    (row,) = (row for row in rows if row.what == "ALPS 1536x576 0.5, against a plain prototype")
    assert row.goal.startswith(">= 1.5x") and row.met is (row.details["ratio"] >= 1.5)


@pytest.mark.parametrize("path", [path for path in results.FOLDER.glob("*-cpu.json")], ids=lambda path: path.stem)
def test_every_committed_row_of_an_op_is_a_comparison_that_exists(path):
    known = {comparison.name for _, case in CASES for comparison in case.comparisons()}
    assert {row.what for row in results.stored(path) if row.section == "ops"} <= known
