"""The device: its description, its ceilings, and the time of calls on it.

Everything runs on a CPU too, where `python -m bench.gpu --rehearse` tries it out with toy sizes; times mean nothing there.
"""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

import sparsekern
from sparsekern import backends

from ..problem import Call

TIMED_SECONDS = 0.25  # for which one thing is run again and again
MOST_ROUNDS = 200


def problem_with_cuda() -> str | None:
    """Return why nothing can be measured, and what to do; None where torch sees a CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; run with a Python whose torch has it (make gpu PYTHON=...)"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} has CUDA {torch.version.cuda} but sees no device; is there a GPU, and does its driver fit?"
        )
    return None


def description() -> dict[str, str]:
    """Return the device's name, and every setting and version that a figure may depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "sparsekern": sparsekern.__version__,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return lines[0].strip() or "unknown"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_memory_back(device: torch.device) -> None:
    """Free what the last benchmark has left over, on the device too.

    Torch before 2.12 takes a capture that failed for one under way, and then keeps the device's memory with an internal error.
    """
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "captures_underway" not in str(error):
            raise


def seconds_of(calls: Sequence[Call], device: torch.device) -> float:
    """Return the median seconds of a call as a program makes it, which includes what the call waits for.

    `calls` do the same on different memory and take turns, so that none finds its inputs in the cache.
    """
    for call in calls:
        call()
    synchronize(device)
    first = _round_seconds(calls, device)
    if device.type != "cuda":
        return first / len(calls)
    more = min(MOST_ROUNDS, int(TIMED_SECONDS / max(first, 1e-9))) or 1
    return statistics.median([first, *(_round_seconds(calls, device) for _ in range(more))]) / len(calls)


def replayed_seconds_of(calls: Sequence[Call], device: torch.device) -> float | None:
    """Return the seconds of a call on the device alone: captured in a CUDA graph, without checks of values, and replayed.

    None where they cannot be captured because something in them waits for the device.
    """
    if device.type != "cuda":
        return seconds_of(calls, device)
    graph = torch.cuda.CUDAGraph()
    with backends.value_checks(False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            return None
    return seconds_of([graph.replay], device) / len(calls)


def _round_seconds(calls: Sequence[Call], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the device: bytes read and written a second, and FLOP a second of a product by the library."""

    copy: float
    bf16: float
    fp32: float

    def floor(self, *, flops: float, unit: str, bytes: float) -> float:
        """Return the least seconds that so many FLOPs and bytes take."""
        return max(bytes / self.copy, flops / getattr(self, unit))


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    return Ceilings(_copy_rate(device, small), *(_product_rate(dtype, device, small) for dtype in (torch.bfloat16, torch.float32)))


def _copy_rate(device: torch.device, small: bool) -> float:
    source = torch.randn(2**16 if small else 2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of([lambda: target.copy_(source)], device)


def _product_rate(dtype: torch.dtype, device: torch.device, small: bool) -> float:
    size = 128 if small else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of([lambda: a @ b], device)
