"""`prune` of a streamed model against the same model in memory: `python -m bench.bench_stream`.

The model is LLaMA-shaped, with random weights in float32: 24 blocks of 28 MB. Each run is a process of its own with two threads; rounds
take turns. The whole `prune` call is timed, with its output and without loading. The checkpoint is in the page cache.

* resident: the model is in memory.
* streamed: its blocks are read.
* throttled: they are read at 200 MB/s, read-ahead included. Copies of whole tensors at the end are not throttled.
* limited: streamed, with the lowest `max_memory` that the run accepts.

Memory is what is resident at the peak of the call, the interpreter and its libraries included. The peak of loading is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import results
from .results import Row

SECTION = "prune of a streamed model"
SLOWER, BESIDE = 1.1, 1.15
RATE = 200e6
SIDES: dict[str, list[str]] = {
    "resident": [],
    "streamed": ["--stream"],
    "throttled": ["--stream", f"--rate={RATE}"],
    "limited": ["--stream", "--least-memory"],
}


@dataclass(frozen=True)
class Size:
    """The size of a run.

    Attributes:
        hidden: Width of the blocks.
        inner: Width of their feed-forward part.
        blocks: Number of blocks.
        samples: Samples of the calibration data.
        length: Tokens of each.
    """

    hidden: int = 768
    inner: int = 2048
    blocks: int = 24
    samples: int = 16
    length: int = 256


TOY = Size(hidden=64, inner=128, blocks=3, samples=2, length=16)


def prepare(work: Path, size: Size) -> int:
    """Write the model and the calibration ids, and return the bytes of the checkpoint."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.hidden // 64,
        max_position_embeddings=size.length,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(work / "model")
    save_file({"ids": torch.randint(512, (size.samples, size.length))}, work / "ids.safetensors")
    return sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))


def run_once(work: Path, side: str) -> dict:
    """Return the result of one run, of which nothing else is kept."""
    for file in (work / "model").glob("*.safetensors"):
        file.read_bytes()  # into the page cache, should something have pushed it out
    out = work / "out"
    out.mkdir()
    command = [sys.executable, "-m", "bench.stream_worker", work / "model", work / "ids.safetensors", out, *SIDES[side]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(part) for part in command], cwd=Path(__file__).parent.parent, env=environment, check=True)
    result = json.loads((out / "result.json").read_text())
    shutil.rmtree(out)
    return result


def rows_of(runs: Mapping[str, list[dict]], what: str) -> list[Row]:
    """Return the rows for the results of the rounds of each side."""
    seconds = {side: statistics.median(run["seconds"] for run in found) for side, found in runs.items()}
    peak = {side: max(run["peak_bytes"] for run in found) for side, found in runs.items()}
    taken, limit = runs["throttled"][0]["bytes_read"], runs["limited"][0]["limit"]
    reading = taken / RATE
    least = max(seconds["resident"], reading)
    return [
        Row(
            SECTION,
            f"{what}: time, the checkpoint in the page cache",
            f"{seconds['streamed'] / seconds['resident']:.2f}x ({results.seconds(seconds['streamed'])})",
            f"in memory {results.seconds(seconds['resident'])}",
            f"<= {SLOWER}x",
            seconds["streamed"] <= SLOWER * seconds["resident"],
            {"streamed": runs["streamed"], "resident": runs["resident"]},
        ),
        Row(
            SECTION,
            f"{what}: time, the checkpoint at {RATE / 1e6:.0f} MB/s",
            f"{results.seconds(seconds['throttled'])}, {seconds['throttled'] / least - 1:+.1%}",
            f"in memory {results.seconds(seconds['resident'])}, reading {taken / 1e6:.0f} MB {results.seconds(reading)}",
            "<= the longer + 15 %",
            seconds["throttled"] <= BESIDE * least,
            {"throttled": runs["throttled"]},
        ),
        Row(
            SECTION,
            f"{what}: peak resident memory",
            f"{peak['streamed'] / 1e6:.0f} MB",
            f"in memory {peak['resident'] / 1e6:.0f} MB",
        ),
        Row(
            SECTION,
            f"{what}: peak resident memory with the lowest max_memory",
            f"{peak['limited'] / 1e6:.0f} MB, {(peak['limited'] - limit) / 1e6:+.0f} MB ({results.seconds(seconds['limited'])})",
            f"without a limit {peak['streamed'] / 1e6:.0f} MB ({results.seconds(seconds['streamed'])})",
            f"<= {limit / 1e6:.0f} MB, the limit",
            peak["limited"] <= limit,
            {"limited": runs["limited"]},
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, one round; nothing is recorded")
    arguments = parser.parse_args()
    size, rounds = (TOY, 1) if arguments.rehearse else (Size(), arguments.rounds)
    run = results.this_run()
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        work = Path(folder)
        nbytes = prepare(work, size)
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, found in runs.items():
                found.append(run_once(work, side))
    model = f"LLaMA of {size.blocks} blocks, {nbytes / 1e6:.0f} MB in float32"
    rows = rows_of(runs, f"{model}, SparseGPT 2:4, {size.samples} x {size.length} tokens")
    print(results.as_table("rehearsal", rows) if arguments.rehearse else results.record(rows, run=run).read_text())


if __name__ == "__main__":
    main()
