"""SmolLM2-135M to 2:4 with SparseGPT, end to end, against llm-compressor 0.14: `python -m bench.bench_prune`.

The environment variable LLMCOMPRESSOR_PYTHON (or `--llmcompressor`) names the Python of an environment that has llm-compressor.
Both get the same float32 weights and the same 32 x 512 token ids of the built-in text, each in a process of its own, one after the
other, with two threads. Ours is timed over the whole `prune` call, theirs over the call of `oneshot`; loading the model counts for
neither. Then both results are evaluated by the same code on the same held-out text.
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

from safetensors.torch import save_file

import sparsekern
from sparsekern.data import calibration_ids, encode, read_documents

from . import results, smollm2
from .results import Row

TEXT = "builtin:python-docs"
BASELINE = Path(__file__).with_name("llmcompressor_baseline.py")
FASTER, PERPLEXITY, MEMORY = 2.5, 1.01, 2.5e9


def prepare(work: Path) -> None:
    """The dense model as a folder and the calibration ids, for both sides."""
    model = smollm2.dense_model()
    model.save_pretrained(work / "dense")
    tokenizer = smollm2.tokenizer()
    tokenizer.save_pretrained(work / "dense")  # llm-compressor insists on one
    ids = calibration_ids(TEXT, tokenizer, samples=smollm2.SAMPLES, length=smollm2.LENGTH)
    save_file({"ids": ids}, work / "ids.safetensors")


def run_ours(work: Path, name: str) -> dict:
    command = [sys.executable, "-m", "bench.prune_worker", smollm2.MODEL, work / "ids.safetensors", work / name]
    return _run(command, work / name)


def run_theirs(work: Path, name: str, python: str, batch_size: int) -> dict:
    command = [python, BASELINE, work / "dense", work / "ids.safetensors", work / name, "--batch-size", str(batch_size)]
    return _run(command, work / name)


def _run(command: list, out: Path) -> dict:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([str(part) for part in command], cwd=out.parent, env=environment, check=True)
    return json.loads((out / "result.json").read_text())


def perplexities(work: Path, names: list[str]) -> dict[str, float]:
    """Of the dense model and of each result, on the held-out part of the built-in text.

    Raises:
        AssertionError: a result is not 2:4, or its embeddings (which are its head) have been touched.
    """
    model, tokenizer = smollm2.dense_model(), smollm2.tokenizer()
    ids = encode(read_documents(TEXT, "held-out"), tokenizer)[: smollm2.WINDOWS * smollm2.WINDOW]
    embeddings = model.get_input_embeddings().weight.clone()
    found = {"dense": sparsekern.perplexity(model, ids, length=smollm2.WINDOW)}
    for name in names:
        smollm2.put_weights(model, work / name / "weights.safetensors")
        assert smollm2.share_of_valid_groups(model) == 1, f"{name} is not 2:4"
        assert model.get_input_embeddings().weight.equal(embeddings), f"{name} has changed the embeddings"
        found[name] = sparsekern.perplexity(model, ids, length=smollm2.WINDOW)
    return found


def rows_of(ours: list[dict], theirs: list[dict], perplexity: dict[str, float]) -> list[Row]:
    what = f"SmolLM2-135M, SparseGPT 2:4, {smollm2.SAMPLES} x {smollm2.LENGTH} tokens"
    section = "prune, end to end"
    times = [statistics.median(run["seconds"] for run in runs) for runs in (ours, theirs)]
    peak = max(run["peak_bytes"] for run in ours)
    baseline = "llm-compressor " + theirs[0]["versions"]["llmcompressor"]
    mine, other = perplexity["ours"], perplexity["theirs"]
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
            f"{what}: perplexity of held-out text",
            f"{mine:.3f} ({mine / other - 1:+.2%})",
            f"{baseline} {other:.3f}, dense {perplexity['dense']:.3f}",
            f"<= {PERPLEXITY * other:.3f} (theirs + 1 %)",
            mine <= PERPLEXITY * other,
            perplexity,
        ),
        Row(
            section,
            f"{what}: peak resident memory",
            f"{peak / 1e9:.2f} GB",
            f"{baseline} {max(run['peak_bytes'] for run in theirs) / 1e9:.2f} GB",
            f"< {MEMORY / 1e9} GB",
            peak < MEMORY,
        ),
    ]


def compare(python: str, batch_size: int = 1, rounds: int = 1) -> list[Row]:
    """Prune with both (ours, theirs, ours, theirs, ...) and evaluate both. `python` is that of llm-compressor's environment."""
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        work = Path(folder)
        prepare(work)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(run_ours(work, "ours"))
            theirs.append(run_theirs(work, "theirs", python, batch_size))
        return rows_of(ours, theirs, perplexities(work, ["ours", "theirs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", default=os.environ.get("LLMCOMPRESSOR_PYTHON"), metavar="PYTHON")
    parser.add_argument("--batch-size", type=int, default=1, help="of llm-compressor; its own default is 1")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if not arguments.llmcompressor:
        parser.error("LLMCOMPRESSOR_PYTHON: expected the Python of an environment with llmcompressor 0.14")
    found = compare(arguments.llmcompressor, arguments.batch_size, arguments.rounds)
    print(results.record(found).read_text())


if __name__ == "__main__":
    main()
