"""How the problems of ops are timed on a CPU, in turns with a baseline, against ceilings measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from .problem import Comparison, NotHere, Place, Turns


def pytest_addoption(parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="toy sizes, to try the benchmarks out; their times mean nothing")


def pytest_generate_tests(metafunc) -> None:
    """Make a test of each comparison among the `CASES` of the module."""
    if "case" in metafunc.fixturenames:
        found = [comparison for case in metafunc.module.CASES for comparison in case.comparisons()]
        metafunc.parametrize("case", found, ids=[comparison.name for comparison in found])


def best_seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Return the least seconds of a call after an untimed one."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(scope="session")
def toy(request) -> bool:
    """Whether problems have toy sizes."""
    return request.config.getoption("--rehearse")


@pytest.fixture(scope="session")
def read_bandwidth(toy) -> float:
    """Bytes a second of a sum over 256 MiB, too large for any cache."""
    data = torch.ones(2**16 if toy else 2**26)
    return data.nbytes / best_seconds(data.sum)


@pytest.fixture(scope="session")
def sgemm_rate(toy) -> float:
    """FLOP a second of a float32 matrix product."""
    size = 128 if toy else 2048
    a, b = torch.ones(2, size, size)
    return 2 * size**3 / best_seconds(lambda: a @ b, rounds=3)


@pytest.fixture
def timed(benchmark, read_bandwidth, sgemm_rate, toy):
    """`timed(comparison)`: check the case's result, time it in turns with the baseline, and store the ratio beside the goal.

    The rounds are ours, baseline, ours, and so on, so that both sides see the same machine. The ratio is that of the medians, or of the
    minima where it is smaller. Where copies of the inputs take turns, each side is called once untimed before it is timed, because the
    first call after the other side is slower. A case with a single round has the result of that round checked. `bench.cpu` makes rows
    of what is stored.
    """

    def run(comparison: Comparison) -> None:
        case, baseline = comparison.case, comparison.baseline
        problem = case.problem(Place(torch.device("cpu"), toy=toy))
        ours, theirs = Turns(problem.calls), Turns(problem.baselines[baseline]) if baseline else None
        if case.rounds > 1:
            problem.check(ours())
        baseline_seconds: list[float] = []
        settled = len(problem.calls) > 1
        setup = _timed_baseline(theirs, baseline_seconds, then=ours if settled else None) if theirs else None
        benchmark.group = comparison.name
        try:
            benchmark.pedantic(ours, setup=setup, rounds=case.rounds, warmup_rounds=int(case.rounds > 1))
        except NotHere as reason:
            pytest.skip(str(reason))
        if case.rounds == 1:
            problem.check(ours.result)
        if benchmark.stats is None:  # --benchmark-disable: called once, for its assertions
            return
        stats = benchmark.stats.stats
        benchmark.extra_info |= {"threads": torch.get_num_threads()}
        if problem.of_dense:
            benchmark.extra_info["of_dense"] = problem.of_dense
        if theirs:
            timed_rounds = baseline_seconds[-case.rounds :]
            median = statistics.median(timed_rounds)
            # Other work on the machine disturbs the minima less than the medians.
            ratio = min(median / stats.median, min(timed_rounds) / stats.min)
            benchmark.extra_info |= {
                "baseline": baseline,
                "baseline_seconds": median,
                "baseline_rounds": timed_rounds,
                "ratio": round(ratio, 3),
                "goal": comparison.goal,
            }
        floors = {"read_bandwidth": problem.read, "sgemm": problem.flops}
        rates = {"read_bandwidth": read_bandwidth, "sgemm": sgemm_rate}
        bound = max(floors, key=lambda name: floors[name] / rates[name])
        if floors[bound]:
            least = floors[bound] / rates[bound]
            benchmark.extra_info |= {
                "bytes": problem.read,
                "flops": problem.flops,
                f"share_of_{bound}": round(least / stats.min, 3),
            }
            if theirs:
                benchmark.extra_info["ratio_at_ceiling"] = round(median / least, 3)

    return run


def _timed_baseline(baseline: Turns, seconds: list[float], then: Turns | None) -> Callable[[], None]:
    """Return a call that times `baseline`; with `then`, each side is called untimed before it is timed."""

    def call() -> None:
        if then is not None:
            baseline()
        start = time.perf_counter()
        baseline()
        seconds.append(time.perf_counter() - start)
        if then is not None:
            then()

    return call
