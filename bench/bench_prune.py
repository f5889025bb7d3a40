"""SmolLM2-135M to 2:4 with SparseGPT, end to end, against llm-compressor 0.14: `python -m bench.bench_prune`.

The environment variable LLMCOMPRESSOR_PYTHON (or `--llmcompressor`) names the Python of an environment that has llm-compressor.
Both sides get the same float32 weights and the same 32 x 512 token ids of the built-in text. Each runs in a process of its own, one
after the other, with two threads. Ours is timed over the whole `prune` call and theirs over the call of `oneshot`, without loading the
model. The same code evaluates both results on the same held-out text.

The order of the samples alone changes a run's perplexity by per cents (bench/NOTES.md). So each round gives both sides the samples
in another order, the mean perplexities are compared, and all of them are stored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import sparsekern
from sparsekern.data import calibration_ids, encode, read_documents

from . import results, smollm2
from .results import Row

TEXT = "builtin:python-docs"
BASELINE = Path(__file__).parent.parent / "baselines" / "llmcompressor_oneshot.py"
FASTER, PERPLEXITY, MEMORY = 2.5, 1.01, 2.5e9


def prepare(work: Path, rounds: int) -> None:
    """Write the dense model as a folder, and the calibration ids of each round, for both sides."""
    model = smollm2.dense_model()
    model.save_pretrained(work / "dense")
    tokenizer = smollm2.tokenizer()
    tokenizer.save_pretrained(work / "dense")  # llm-compressor insists on one
    ids = calibration_ids(TEXT, tokenizer, samples=smollm2.SAMPLES, length=smollm2.LENGTH)
    for index in range(rounds):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(index)) if index else torch.arange(len(ids))
        save_file({"ids": ids[order]}, work / f"ids-{index}.safetensors")


def run_ours(work: Path, index: int) -> dict:
    out = work / f"ours-{index}"
    return _run([sys.executable, "-m", "bench.prune_worker", smollm2.MODEL, work / f"ids-{index}.safetensors", out], out)


def run_theirs(work: Path, index: int, python: str, batch_size: int) -> dict:
    out = work / f"theirs-{index}"
    ids = work / f"ids-{index}.safetensors"
    return _run([python, BASELINE, work / "dense", ids, out, "--batch-size", str(batch_size)], out)


def _run(command: list, out: Path) -> dict:
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([str(part) for part in command], cwd=out.parent, env=environment, check=True)
    return json.loads((out / "result.json").read_text())


def perplexities(work: Path, names: list[str]) -> list[float]:
    """Return the perplexity of each result on the held-out part of the built-in text; "dense" names the dense model.

    Raises:
        AssertionError: A result is not 2:4, or its embeddings (which are its head) have changed.
    """
    model, tokenizer = smollm2.dense_model(), smollm2.tokenizer()
    ids = encode(read_documents(TEXT, "held-out"), tokenizer)[: smollm2.WINDOWS * smollm2.WINDOW]
    embeddings = model.get_input_embeddings().weight.clone()
    found = []
    for name in names:
        if name != "dense":
            smollm2.put_weights(model, work / name / "weights.safetensors")
            assert smollm2.share_of_valid_groups(model) == 1, f"{name} is not 2:4"
            assert model.get_input_embeddings().weight.equal(embeddings), f"{name} has changed the embeddings"
        found.append(sparsekern.perplexity(model, ids, length=smollm2.WINDOW))
    return found


def rows_of(ours: list[dict], theirs: list[dict], dense: float) -> list[Row]:
    """Return the rows for the results of the rounds of both sides, each with its `perplexity`."""
    what = f"SmolLM2-135M, SparseGPT 2:4, {smollm2.SAMPLES} x {smollm2.LENGTH} tokens"
    section = "prune, end to end"
    baseline = "llm-compressor " + theirs[0]["versions"]["llmcompressor"]
    times, perplexity, spread, peak = ([], [], [], [])
    for runs in (ours, theirs):
        values = [run["perplexity"] for run in runs]
        times.append(statistics.median(run["seconds"] for run in runs))
        perplexity.append(statistics.fmean(values))
        spread.append(f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
        peak.append(max(run["peak_bytes"] for run in runs))
    limit = PERPLEXITY * perplexity[1]
    return [
        Row(
            section,
            f"{what}: the whole call",
            f"{times[1] / times[0]:.2f}x ({results.seconds(times[0])})",
            f"{baseline} {results.seconds(times[1])}",
            f">= {FASTER}x",
            times[1] / times[0] >= FASTER,
            {"ours": ours, "theirs": theirs},
        ),
        Row(
            section,
            f"{what}: perplexity of held-out text, mean of {len(ours)} orders of the samples",
            f"{perplexity[0]:.2f}{spread[0]}, {perplexity[0] / perplexity[1] - 1:+.1%}",
            f"{baseline} {perplexity[1]:.2f}{spread[1]}, dense {dense:.2f}",
            f"<= {limit:.2f} (theirs + 1 %)",
            perplexity[0] <= limit,
        ),
        Row(
            section,
            f"{what}: peak resident memory",
            f"{peak[0] / 1e9:.2f} GB",
            f"{baseline} {peak[1] / 1e9:.2f} GB",
            f"< {MEMORY / 1e9} GB",
            peak[0] < MEMORY,
        ),
    ]


def compare(python: str, batch_size: int = 1, rounds: int = 3) -> list[Row]:
    """Prune with both (ours, theirs, ours, theirs, ...) and evaluate both; `python` is that of llm-compressor's environment."""
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        work = Path(folder)
        prepare(work, rounds)
        ours, theirs = [], []
        for index in range(rounds):
            ours.append(run_ours(work, index))
            theirs.append(run_theirs(work, index, python, batch_size))
        return evaluate(work, ours, theirs)


def evaluate(work: Path, ours: list[dict], theirs: list[dict]) -> list[Row]:
    """Add its perplexity to each round's result."""
    names = [f"{side}-{index}" for side, runs in (("ours", ours), ("theirs", theirs)) for index in range(len(runs))]
    dense, *found = perplexities(work, ["dense", *names])
    for run, perplexity in zip([*ours, *theirs], found, strict=True):
        run["perplexity"] = perplexity
    return rows_of(ours, theirs, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", default=os.environ.get("LLMCOMPRESSOR_PYTHON"), metavar="PYTHON")
    parser.add_argument("--batch-size", type=int, default=1, help="of llm-compressor; its own default is 1")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.llmcompressor:
        parser.error("LLMCOMPRESSOR_PYTHON: expected the Python of an environment with llmcompressor 0.14")
    run = results.this_run()
    found = compare(arguments.llmcompressor, arguments.batch_size, arguments.rounds)
    print(results.record(found, run=run).read_text())


if __name__ == "__main__":
    main()
