"""`prune` of SmolLM2-135M in bfloat16 and float16 against float32: `python -m bench.bench_half`.

On a CPU without arithmetic for a half dtype, products of many tokens run in float32 (`SPARSEKERN_FLOAT32_PRODUCTS`). Each run is a process of
its own with two threads; rounds take turns. The whole `prune` call is timed, without loading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from sparsekern.data import calibration_ids
from sparsekern.models.float32_products import VARIABLE, lacks_arithmetic

from . import results, smollm2
from .results import Row

TEXT = "builtin:python-docs"
SECTION = "prune in half precision"
SLOWER = 1.3
SIDES = [("float32", "1"), ("bfloat16", "1"), ("float16", "1"), ("bfloat16", "0")]
Side = tuple[str, str]


def run_once(work: Path, side: Side) -> float:
    """Return the seconds of one `prune`; `side` is a dtype and the value of the environment variable."""
    dtype, switch = side
    command = [
        sys.executable,
        "-m",
        "bench.prune_worker",
        smollm2.MODEL,
        str(work / "ids.safetensors"),
        str(work / "out"),
        "--dtype",
        dtype,
    ]
    subprocess.run(command, cwd=Path(__file__).parent.parent, env={**os.environ, VARIABLE: switch}, check=True)
    return json.loads((work / "out" / "result.json").read_text())["seconds"]


def rows_of(seconds: Mapping[Side, list[float]], what: str) -> list[Row]:
    """Return the rows for the seconds of the rounds of each side."""
    median = {side: statistics.median(found) for side, found in seconds.items()}
    single, rows = median["float32", "1"], []
    for dtype in ("bfloat16", "float16"):
        own = median[dtype, "1"]
        rows.append(
            Row(
                SECTION,
                f"{what}, {dtype}: time against float32",
                f"{own / single:.2f}x ({results.seconds(own)})",
                f"float32 {results.seconds(single)}",
                f"<= {SLOWER}x",
                own <= SLOWER * single,
                {"seconds": seconds[dtype, "1"], "float32_seconds": seconds["float32", "1"]},
            )
        )
    own, left = median["bfloat16", "1"], median["bfloat16", "0"]
    rows.append(
        Row(
            SECTION,
            f"{what}, bfloat16: products in float32",
            f"{left / own:.2f}x ({results.seconds(own)})",
            f"PyTorch's own products {results.seconds(left)}",
            details={"seconds": seconds["bfloat16", "1"], "own_products_seconds": seconds["bfloat16", "0"]},
        )
    )
    return rows


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=smollm2.SAMPLES)
    arguments = parser.parse_args()
    if not lacks_arithmetic(torch.bfloat16):
        parser.error("this CPU has bfloat16 arithmetic, so products are PyTorch's own")
    run = results.this_run()
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        work = Path(folder)
        ids = calibration_ids(TEXT, smollm2.tokenizer(), samples=arguments.samples, length=smollm2.LENGTH)
        save_file({"ids": ids}, work / "ids.safetensors")
        seconds: dict[Side, list[float]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                seconds[side].append(run_once(work, side))
    what = f"SmolLM2-135M, SparseGPT 2:4, {arguments.samples} x {smollm2.LENGTH} tokens"
    print(results.record(rows_of(seconds, what), run=run).read_text())


if __name__ == "__main__":
    main()
