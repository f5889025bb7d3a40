"""Run one `sparsekern.prune` in a process of its own, to measure its peak memory: `python -m bench.prune_worker MODEL IDS OUT`.

MODEL is anything that `sparsekern.load` takes, IDS a safetensors file with `ids` `[samples, length]`. OUT receives `result.json` and the
pruned weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sparsekern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = sparsekern.load(arguments.model, dtype=arguments.dtype, device="cpu")
    ids = load_file(arguments.ids)["ids"]
    loaded = peak_bytes()
    start = time.perf_counter()
    report = sparsekern.prune(model, arguments.method, arguments.pattern, ids, progress=False)
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "phases": report.seconds,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_bytes(),
        "peak_bytes_when_loaded": loaded,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, arguments.out / "weights.safetensors")


def peak_bytes() -> int:
    """Return the most memory this process has had resident so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
