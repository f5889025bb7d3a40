"""`python -m bench.gpu` without a GPU: what it says then, and everything in it that does not need one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import results
from bench.gpu import __main__ as command
from bench.gpu import checks, device, measure, run, worker
from bench.gpu.budget import Budget
from bench.gpu.crossing import COMPRESSED, DENSE, PACKED, SWEEPS, UNPACKED, crossing
from bench.gpu.rows import DeviceCase, DevicePlace
from bench.problem import Case, Faster, NotHere, Problem, Share, Taken, Within
from bench.results import Row
from sparsekern.backends import libraries

ROOT = Path(__file__).resolve().parents[2]


class Time:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def budget() -> Budget:
    return Budget(300, Time())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line():
    done = subprocess.run([sys.executable, "-m", "bench.gpu", "--only", "ops"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("bench.gpu: torch ") and done.stderr.count("\n") == 1


def test_without_torch_it_says_so_in_a_line():
    done = subprocess.run([sys.executable, "-S", "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("bench.gpu: this Python has no torch; ") and done.stderr.count("\n") == 1


def test_a_budget_is_spent_and_names_what_it_cut(budget):
    assert budget.left == 300 and budget.share(100) == 100 and budget.allows("first", 200)
    part = budget.part(0.4)
    assert part.left == 120 and not part.allows("second", 121)
    budget._now.seconds = 250
    assert budget.left == 50 and budget.share(100) == 50 and part.left == 0
    assert not budget.allows("third", 60) and budget.cut == ["second", "third"]
    budget._now.seconds = 400
    assert budget.left == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_rehearsal_of_every_benchmark(tmp_path):
    """Each with toy sizes on the CPU: its inputs, its check, its baselines and its row."""
    file = tmp_path / "rows.jsonl"
    names = worker.ordered()
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.worker", "--rehearse", "--profile", file, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows, running = measure._read(file)
    assert running is None
    assert len(rows) == 3 + len(names)
    assert not [row for row in rows if "failed" in row.reached]
    assert {row.section for row in rows} == {"ceilings", "ops", "prune"}
    assert "Self CPU time total" in done.stdout


def test_the_order_and_the_likely_time_of_benchmarks():
    names = worker.ordered()
    assert len(set(names)) == len(names)
    (whole,) = (name for name in names if "the whole call" in name)
    by_importance = [
        "obs_sweep 4096x4096 2:4",
        "gram_ bfloat16 [262144, 4096]",
        whole,
        "2:4 linear, 4096 tokens, 11008x4096 bf16",
        "nm_mask 2:4 8192x8192 bfloat16",
        worker.SWEEPS[-1].name,
    ]
    assert [name for name in names if name in by_importance] == by_importance
    assert names[0] == by_importance[0] and names[-1] == by_importance[-1]
    assert sum(map(worker.likely_seconds, names)) < 330
    assert sum(map(worker.likely_seconds, names[: names.index(whole) + 1])) < 120


def test_parts_and_a_text_select_benchmarks():
    assert worker.ordered(["e2e"]) == [run.name for run in worker.e2e.RUNS]
    assert worker.ordered(["ops"], "from how many tokens") == [sweep.name for sweep in worker.SWEEPS]
    assert set(worker.ordered(["ops"])) | set(worker.ordered(["e2e"])) == set(worker.ordered())


def test_a_text_that_selects_nothing_is_an_error(capsys):
    assert command.main(["--rehearse", "--only", "e2e", "-k", "no such benchmark"]) == 2
    assert capsys.readouterr().err == "bench.gpu: -k 'no such benchmark' selects nothing of e2e\n"


def finishing(started, clock, seconds):
    """A worker that runs all its benchmarks in so many seconds."""

    def run(names, file, budget, log, options):
        started.append(list(names))
        clock.seconds += seconds
        file.write_text(json.dumps({"start": None}) + "\n")
        return "the process ended with 0"

    return run


def test_what_does_not_fit_is_cut_and_shorter_ones_are_not(budget, monkeypatch, tmp_path):
    seconds, started = {"a": 100, "b": 250, "c": 100}, []
    monkeypatch.setattr(worker, "likely_seconds", seconds.__getitem__)
    monkeypatch.setattr(measure, "_run_worker", finishing(started, budget._now, 200))
    measure.measure(["a", "b", "c"], budget, tmp_path / "bench.log")
    assert started == [["a", "c"]] and budget.cut == ["b"]


def test_what_did_not_seem_to_fit_has_another_chance(budget, monkeypatch, tmp_path):
    seconds, started = {"a": 100, "b": 250, "c": 100}, []
    monkeypatch.setattr(worker, "likely_seconds", seconds.__getitem__)
    monkeypatch.setattr(measure, "_run_worker", finishing(started, budget._now, 20))
    measure.measure(["a", "b", "c"], budget, tmp_path / "bench.log")
    assert started == [["a", "c"], ["b"]] and budget.cut == []


def test_a_crash_costs_one_row_and_a_restart(budget, monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "likely_seconds", lambda name: 1)
    started = []

    def crashing(names, file, budget, log, options):
        started.append(list(names))
        lines = [{"start": "ceilings"}, {"start": names[0]}, {"row": {"section": "ops", "what": names[0], "reached": "1 ms"}}]
        lines.append({"start": "crasher"} if "crasher" in names else {"start": None})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "the process ended with -11"

    monkeypatch.setattr(measure, "_run_worker", crashing)
    rows = measure.measure(["first", "crasher", "last"], budget, tmp_path / "bench.log")
    assert started == [["first", "crasher", "last"], ["last"]]
    assert [(row.what, row.met) for row in rows] == [("first", None), ("crasher", False), ("last", None)]
    assert "the process ended with -11; see bench.log" in rows[1].reached


def test_ceilings_that_crash_end_it(budget, monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "likely_seconds", lambda name: 1)
    monkeypatch.setattr(measure, "_run_worker", lambda names, file, *rest: "the process ended with 1")
    rows = measure.measure(["first", "second"], budget, tmp_path / "bench.log")
    assert [row.what for row in rows] == ["the start of the process"] and rows[0].met is False


def test_a_worker_that_hangs_is_stopped(budget, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SECONDS_WITHOUT_A_WORD", 0.3)
    monkeypatch.setattr(measure.sys, "executable", str(tmp_path / "hang"))
    (tmp_path / "hang").write_text("#!/bin/sh\nsleep 60 & sleep 60\n")
    (tmp_path / "hang").chmod(0o755)
    (tmp_path / "rows").touch()
    assert measure._run_worker(["a"], tmp_path / "rows", budget, tmp_path / "log", []).startswith("stopped after 0 s")


def test_commands_are_logged_and_stopped(tmp_path):
    log = tmp_path / "log"
    assert run.run([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], log, 60) == 3
    assert run.run([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.2) is run.TIMED_OUT
    assert run.last_lines(log, 1) == "stopped after 0 s" and "hello" in log.read_text()
    assert run.last_lines(tmp_path / "none") == ""


PYTEST = """
tests/gpu/test_calls.py::test_a[x y-cuda] PASSED                         [ 10%]
tests/gpu/test_calls.py::test_b SKIPPED (needs two CUDA devices)         [ 20%]
tests/gpu/test_calls.py::test_c FAILED                                   [ 30%]
tests/gpu/test_calls.py::test_d """


def test_what_came_of_tests():
    row = checks.as_row("some tests", 1, PYTEST + "\nE   assert 1 == 2\n")
    assert row.reached == "1 passed, 1 failed, 1 skipped" and row.met is False
    assert row.details == {"failed": ["tests/gpu/test_calls.py::test_c"], "why": ["assert 1 == 2"]}
    stopped = checks.as_row("some tests", None, PYTEST)
    assert "stopped in tests/gpu/test_calls.py::test_d" in stopped.reached and stopped.met is False  # test_c has failed
    assert checks.as_row("some tests", None, PYTEST.replace("FAILED", "PASSED")).met is None
    assert checks.as_row("some tests", 0, PYTEST[:80]).met is True
    assert checks.as_row("some tests", 5, "").met is None
    crashed = checks.as_row("some tests", -11, PYTEST[:80] + "\nFatal Python error: Segmentation fault")
    assert crashed.met is False and crashed.reached == "1 passed, ended with -11: Fatal Python error: Segmentation fault"


def test_what_a_sanitizer_found():
    clean = "call gram_\nran 3 calls\n========= ERROR SUMMARY: 0 errors\n"
    assert checks.as_sanitizer_row("memcheck", 0, clean).reached == "3 calls, nothing found"
    found = checks.as_sanitizer_row("memcheck", 86, "ran 3 calls\n========= ERROR SUMMARY: 7 errors\n")
    assert found.met is False and found.reached == "**failed**: 7 errors"
    races = checks.as_sanitizer_row("racecheck", 86, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n")
    assert races.met is False and "2 errors" in races.reached
    assert checks.as_sanitizer_row("memcheck", None, "call a\ncall b\n").reached.startswith("stopped after 2 calls")
    assert "refuses this device" in checks.as_sanitizer_row("memcheck", 1, "========= Error: Device not supported.\n").reached
    assert checks.as_sanitizer_row("memcheck", 1, "Traceback").met is False


def test_a_library_that_does_not_load_is_told(monkeypatch):
    monkeypatch.setattr(libraries, "LIBRARIES", {"_C": libraries.Library("_C", True, "")})
    with pytest.raises(SystemExit) as ended:
        exec(checks.LOADED, {})
    assert ended.value.code == 0
    monkeypatch.setitem(libraries.LIBRARIES, "_C_cuda", libraries.Library("_C_cuda", False, "libcudart.so: not found"))
    with pytest.raises(SystemExit) as ended:
        exec(checks.LOADED, {})
    assert ended.value.code == "_C_cuda: libcudart.so: not found"


def test_a_library_that_does_not_load_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "LOADED", "raise SystemExit('_C_cuda: not built')")
    row = checks.loads(tmp_path / "log", 60)
    assert row.met is False and row.reached == "**failed**: _C_cuda: not built"
    monkeypatch.setattr(checks, "LOADED", "")
    assert checks.loads(tmp_path / "log", 60) is None


@pytest.mark.parametrize(
    ("taken_along", "loading", "done"),
    [
        (True, [True], ["load"]),
        (True, [False, True], ["load", "build", "load"]),  # made for another system
        (True, [False, False], ["load", "build", "load"]),
        (False, [True], ["build", "load"]),
    ],
)
def test_extensions_that_were_taken_along_are_built_where_they_do_not_load(tmp_path, monkeypatch, taken_along, loading, done):
    bad, did, left = Row("checks", "loading", "**failed**", met=False), [], list(loading)
    monkeypatch.setattr(checks, "build", lambda budget, log: did.append("build"))
    monkeypatch.setattr(checks, "loads", lambda log, seconds: did.append("load") or (None if left.pop(0) else bad))
    found = checks.libraries(Budget(60), tmp_path / "log", 10, taken_along)
    assert did == done and found is (None if loading[-1] else bad)


def test_without_cpp_only_ops_with_a_kernel_in_cpp_run_again():
    runs = checks.all_runs()
    again = {run.path for run in runs if run.kernels == "gpu-triton"}
    assert {f"tests/ops/test_{name}.py" for name in ("obs_sweep", "bitmask_linear", "nm_linear", "contracts")} <= again
    assert not {f"tests/ops/test_{name}.py" for name in ("gram", "masked_lstsq", "topk_mask")} & again
    assert {run.path for run in runs if run.kernels == "gpu"} > again
    assert "tests/gpu/test_calls.py" in {run.path for run in runs if run.kernels is None}


def test_every_part_that_is_checked_exists():
    for path in ("tests/ops", "tests/gpu", "setup.py"):
        assert (ROOT / path).exists()
    for name in ("samples", "worker"):
        assert (ROOT / "bench" / "gpu" / f"{name}.py").is_file()


def test_goals():
    taken = Taken(called=2e-3, on_device=1e-3, against={"textbook": 0.3}, floor=0.85e-3)
    assert Faster(100, "textbook").met(taken) and not Faster(200, "textbook").met(taken)
    assert Within(3e-3).met(taken) and not Within(1e-3).met(taken)
    assert replace(taken, on_device=None).share == 0.425
    assert Share(0.8).met(taken) and not Share(0.9).met(taken)
    assert [str(goal) for goal in (Faster(100, "textbook"), Within(3e-3), Share(0.8))] == [
        ">= 100x textbook", "<= 3 ms", ">= 80% of the floor",
    ]  # fmt: skip


def place() -> DevicePlace:
    return DevicePlace(torch.device("cpu"), True, ceilings=device.Ceilings(1e9, 1e9, 1e9))


def device_case(make, cuda=None, **more) -> DeviceCase:
    return DeviceCase(Case("c", make, {}, {}, cuda=cuda or {}, **more))


def made_of(check, baselines=None, cuda=None) -> DeviceCase:
    def make(place):
        return Problem([lambda: 1], check, baselines or {}, read=600, written=400)

    return device_case(make, cuda, device_goals=(Within(10),))


def test_a_benchmark_whose_result_is_wrong_is_not_timed():
    def wrong(result):
        raise AssertionError("not the expected bits")

    (row,) = made_of(wrong).rows(place())
    assert row.met is False and row.reached == "**failed**: AssertionError: not the expected bits"


def test_a_benchmark_that_cannot_run_here_says_why():
    def not_here(place):
        raise NotHere("no cuSPARSELt")

    (row,) = device_case(not_here).rows(place())
    assert row.met is None and row.reached == "not run: no cuSPARSELt"


class CompilationError(Exception):
    """Triton's own errors derive from Exception alone."""


def raising(message: str, kind: type[Exception] = RuntimeError):
    def make(place):
        raise kind(message)

    return device_case(make)


def test_an_error_is_a_row_unless_the_device_is_lost():
    (row,) = raising("a kernel", CompilationError).rows(place())
    assert row.met is False and row.reached == "**failed**: CompilationError: a kernel"
    (row,) = raising("no such algorithm").rows(place())
    assert row.met is False and row.reached == "**failed**: RuntimeError: no such algorithm"
    (row,) = raising("gram_: the cuda implementation was requested, but it is not built").rows(place())
    assert row.met is None and row.reached.startswith("not run: ")
    (row,) = raising("CUDA error: operation not supported when calling `cusparseLtDenseDescriptorInit`").rows(place())
    assert row.met is False and "cusparseLtDenseDescriptorInit" in row.reached
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(raising("CUDA error: an illegal memory access was encountered").rows(place()))


def test_a_row_has_the_ratio_the_time_and_the_floor():
    slow = {"slow": [lambda: sum(range(10000))], "not asked for": [lambda: 1 / 0]}
    (row,) = made_of(lambda result: None, slow, {"slow": 1.0, "only elsewhere": 2.0}).rows(place())
    assert row.met is True and row.goal == ">= 1.0x slow, <= 10 s" and row.against.startswith("slow ")
    assert "x** slow" in row.reached and "of the floor 0.001 ms" in row.reached
    assert row.details["floor_seconds"] == 1e-6 and row.details["bytes"] == 1e3


def test_where_two_ways_cross():
    against = {17: 2.0, 64: 2.0, 128: 2.0, 512: 4.0}
    assert crossing({17: 3.0, 64: 2.0, 128: 1.0, 512: 1.0}, against) == 64
    assert crossing({17: 1.0, 64: 3.0, 128: 1.0, 512: 1.0}, against) == 128  # where it wins once below is by chance
    assert crossing({17: 1.0, 64: 1.0, 128: 1.0, 512: 1.0}, against) == 17
    assert crossing({17: 1.0, 64: 1.0, 128: 1.0, 512: 5.0}, against) is None


def test_a_sweep_names_the_crossing():
    taken = {PACKED: {17: 1e-4}, UNPACKED: {17: 3e-4, 64: 3e-4}, COMPRESSED: {17: 2e-4, 64: 2e-4}, DENSE: {17: 1e-4, 64: 1e-4}}
    row = SWEEPS[0]._row(taken)
    assert row.reached.startswith("cuSPARSELt wins from **64** tokens on (FEWEST_TOKENS is ") and row.met is None
    assert row.details == {"crossing": 64, "seconds": taken}
    assert "with 64 it takes 0.2 ms, unpacking and cuBLAS 0.3 ms, the dense weight 0.1 ms" in row.reached
    taken[COMPRESSED][64] = 4e-4
    assert SWEEPS[0]._row(taken).reached.startswith("cuSPARSELt wins at no number of tokens measured (")


def test_parts_put_their_rows_into_one_file(tmp_path):
    run = {"date": "2026-01-02", "commit": "1111111111", "device": "NVIDIA H200", "driver": "1"}
    results.record([Row("ops", "a", "1 ms"), Row("ops", "b", "2 ms")], tmp_path, run)
    table = results.record([Row("checks", "t", "3 passed", met=True), Row("ops", "b", "4 ms")], tmp_path, run)
    assert table == tmp_path / "nvidia-h200.md"
    rows = results.stored(table.with_suffix(".json"))
    assert [(row.what, row.reached) for row in rows] == [("t", "3 passed"), ("a", "1 ms"), ("b", "4 ms")]
    page = table.read_text()
    assert page.startswith("# NVIDIA H200\n\n## checks\n") and "device NVIDIA H200, driver 1.\n" in page
    assert "| b |  | 4 ms |  |  | 2026-01-02, 1111111111 |" in page


def test_the_last_words(capsys, budget):
    budget.cut.append("obs_sweep 4096x11008 2:4")
    rows = [
        Row("ops", "gram_", "**1.7x** torch.mm", goal=">= 1.6x", met=True),
        Row("ops", "semi_structured_pack", "**failed**: wrong bits", met=False),
        Row("checks", "tests/ops/test_gram.py", "1 failed", met=False, details={"failed": ["test_a"]}),
        Row("checks", "tests/ops/test_semi_structured_pack.py", "9 passed", met=True),
    ]
    assert command._say(rows, budget) == 1
    said = capsys.readouterr().out
    assert "met  gram_: 1.7x torch.mm [goal >= 1.6x]" in said and "checks: 1 of 2 passed" in said
    assert "FAILED semi_structured_pack: failed: wrong bits" in said and "    test_a" in said
    assert said.endswith("cut, no time was left: obs_sweep 4096x11008 2:4\n")
    assert command._say(rows[:1], Budget(1)) == 0


def test_arguments():
    assert command.parse([]).minutes == 9 and command.parse([]).only is None
    assert command.parse(["--only", "ops", "--only", "e2e", "-k", "gram"]).only == ["ops", "e2e"]
    with pytest.raises(SystemExit):
        command.parse(["--only", "everything"])
