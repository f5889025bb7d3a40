"""What all benchmarks share: the ceilings of this machine, taken in the same run, and how a time is set against them.

A benchmark first asserts that what it times gives the right result. Ours and the baselines are one group of the report, which
shows the ratios; absolute times from a machine that does other work mean little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch


def best_seconds(function: Callable[[], object], rounds: int = 5) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rate(dtype: torch.dtype, size: int) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: a @ b, rounds=3)


@pytest.fixture(scope="session")
def read_bandwidth() -> float:
    """Bytes a second of a sum over 256 MiB, too large for any cache."""
    data = torch.ones(2**26)
    return data.nbytes / best_seconds(data.sum)


@pytest.fixture(scope="session")
def sgemm_rate() -> float:
    """float32 FLOP a second of a matrix product."""
    return gemm_rate(torch.float32, 2048)


@pytest.fixture(scope="session")
def bf16_gemm_rate() -> float:
    """bfloat16 FLOP a second of a matrix product."""
    return gemm_rate(torch.bfloat16, 2048)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def measure(benchmark, request):
    """`measure(function, group=..., bytes=..., flops=...)`: times it and stores what share of the ceilings it reaches.

    `bytes` is what the operation must read at least, `flops` what it must compute; `setup` runs untimed before each round.
    `against` is a baseline that is timed between the rounds of `function` (ours, baseline, ours, ...), so that both see the same
    machine; the ratio of the medians, or of the minima where that is smaller, is stored with the `goal` it is to reach, and the
    ratio that a kernel at the ceiling would have. `settled` has either called once untimed before it is timed: the first call
    behind the other side is some 50 us slower (bench/README.md), which layers that follow one another do not pay. `bench.cpu`
    collects those.
    """

    def run(
        function,
        *,
        group: str,
        bytes: int = 0,
        flops: int = 0,
        ceiling: str = "sgemm_rate",
        setup=None,
        rounds: int = 5,
        warmup: bool = True,
        against=None,
        settled: bool = False,
        goal: float | None = None,
        **notes,
    ):
        benchmark.group = group
        baseline_seconds: list[float] = []
        if against is not None:
            setup = _timed(against, baseline_seconds, then=function if settled else None)
        result = benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=int(warmup))
        if benchmark.stats is None:  # --benchmark-disable: called once, for its assertions
            return result
        stats = benchmark.stats.stats
        benchmark.extra_info |= {"threads": torch.get_num_threads(), **notes}
        if against is not None:
            baseline_seconds = baseline_seconds[-rounds:]
            baseline = statistics.median(baseline_seconds)
            # Where something else ran for a while, the medians of the two may have seen different machines; the minima less so.
            ratio = min(baseline / stats.median, min(baseline_seconds) / stats.min)
            benchmark.extra_info |= {
                "baseline_seconds": baseline,
                "baseline_rounds": baseline_seconds,
                "ratio": round(ratio, 3),
                "goal": goal,
            }
        if bytes:
            share = bytes / stats.min / request.getfixturevalue("read_bandwidth")
            benchmark.extra_info |= {"bytes": bytes, "share_of_read_bandwidth": round(share, 3)}
        if flops:
            rate = request.getfixturevalue(ceiling)
            share = flops / stats.min / rate
            benchmark.extra_info |= {"flops": flops, f"share_of_{ceiling.removesuffix('_rate')}": round(share, 3)}
            if against is not None:
                benchmark.extra_info["ratio_at_ceiling"] = round(baseline * rate / flops, 3)
        return result

    return run


def _timed(against: Callable[[], object], seconds: list[float], then: Callable[[], object] | None) -> Callable[[], None]:
    """Times `against`; with `then`, calls it once before, and `then` behind it, which is to be timed next."""

    def call() -> None:
        if then is not None:
            against()
        start = time.perf_counter()
        against()
        seconds.append(time.perf_counter() - start)
        if then is not None:
            then()

    return call
