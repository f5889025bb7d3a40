"""Run one `sparsekern.prune` with its output in a process of its own: `python -m bench.stream_worker MODEL IDS OUT`.

IDS is a safetensors file with `ids` `[samples, length]`. OUT receives `result.json`, and the pruned model in `model`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

import sparsekern
from sparsekern.measure.resident import STATUS, current_and_peak
from sparsekern.models.stored_reading import Stamps


class Source:
    """What a streamed model reads its tensors with: it counts their bytes, and reads no faster than a rate.

    Files that are copied whole at the end of a run are not counted.

    Attributes:
        rate: Bytes a second; None is no limit.
        taken: The bytes that were read.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate, self.taken, self._read = rate, 0, Stamps.read

    def read(self, stamps: Stamps, stored: Mapping) -> dict[str, torch.Tensor]:
        """Read as `Stamps.read` does; return when the bytes would have come at the rate."""
        start = time.perf_counter()
        found = self._read(stamps, stored)
        size = sum(entry.nbytes for entry in stored.values())
        self.taken += size
        if self.rate is not None:
            time.sleep(max(0.0, size / self.rate - (time.perf_counter() - start)))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--rate", type=float, help="bytes a second that the source gives")
    parser.add_argument("--least-memory", action="store_true", help="with the lowest max_memory that the run accepts")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = Source(arguments.rate)
    setattr(Stamps, "read", lambda stamps, stored: source.read(stamps, stored))  # noqa: B010
    ids = load_file(arguments.ids)["ids"]
    model = sparsekern.load(arguments.model, device="cpu", stream=arguments.stream)
    limit = 1 if arguments.least_memory else None
    while True:  # a run refuses a limit that is too low, first for the model alone, then with what solving takes
        before, _ = current_and_peak(STATUS.read_text())
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        source.taken = 0
        start = time.perf_counter()
        try:
            report = sparsekern.prune(model, "sparsegpt", "2:4", ids, out=arguments.out / "model", max_memory=limit, progress=False)
            break
        except ValueError as error:
            limit = least_of(error, limit)
    seconds = time.perf_counter() - start
    _, peak = current_and_peak(STATUS.read_text())
    result = {
        "seconds": seconds,
        "phases": report.seconds,
        "threads": torch.get_num_threads(),
        "bytes_read": source.taken,
        "bytes_before": before,
        "peak_bytes": peak,
        "limit": limit,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))


def least_of(error: ValueError, limit: int | None) -> int:
    """Return the `max_memory` in bytes that the refusal of a lower one asks for; raise any other error."""
    found = re.search(r"^max_memory: expected at least ([\d,.]+) MB", str(error))
    least = round(float(found[1].replace(",", "")) * 1e6) if found else 0
    if limit is None or least <= limit:
        raise error
    return least


if __name__ == "__main__":
    main()
