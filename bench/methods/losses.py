"""What zeros and few bits cost and buy on SmolLM2-135M: `python -m bench.methods.losses FOLDER --llama-cpp BUILD`.

FOLDER holds `valid.txt` and `test.txt` of WikiText-2. BUILD is a folder in which llama.cpp was built with its programs `llama-bench` and
`llama-quantize`; without it the speeds of its formats and Q4_K_M are not measured. For each way to store the model: bits a weight of the
linears in the blocks, the whole file, perplexity of the stored numbers in float32, and tokens a second, one at a time, on two threads.

The weights of this model come from a file whose linears have 4 bits already (Q4_1), so that what 4 bits cost a dense model is less here
than it is elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.runtime import SparseLinear, weight_bytes

from .. import quality, smollm2
from ..llama_cpp import program_of, seconds_of_llama_cpp, seconds_of_token
from . import Unavailable, shown, store, stored

NAME = "losses"
DENSE, Q4_0 = "dense, bf16", "2:4, 4 bits, as Q4_0"
BY_LLAMA = {"dense, Q8_0": "q8_0", "dense, Q4_0": "q4_0"}
K_QUANT = "dense, Q4_K_M"
OURS: dict[str, tuple[str | float, dict[str, Any]]] = {
    "50 %, bf16": (0.5, {}),
    "2:4, bf16": ("2:4", {}),
    "2:4, 4 bits": ("2:4", {"values": "int4"}),
}
ROWS = (DENSE, *BY_LLAMA, K_QUANT, *OURS, Q4_0)
THREADS, TOKENS, ROUNDS = 2, 48, 5
COLUMNS = ("bits a weight", "MB", "perplexity", "tokens a second")


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    return section(measure(wikitext, None, "fast", quick))


def measure(wikitext: Path, build: Path | None, preset: str, quick: bool = False) -> dict[str, object]:
    """Return the figures by row and column. Those of a row are stored when they are known, unless `quick`."""
    words = smollm2.tokenizer()
    calibration, evaluation = quality.calibration(wikitext, words), quality.evaluation(wikitext, words)
    if quick:
        calibration, evaluation = calibration[:4], evaluation[: smollm2.WINDOW // 2]
    figures: dict[str, object] = {}

    def keep(row: str, *values: float | None) -> None:
        found = {f"{row}, {column}": value for column, value in zip(COLUMNS, values, strict=True) if value is not None}
        if not quick:
            store(NAME, found)
        figures.update(found)
        print(row, values, flush=True)

    def perplexity(model: torch.nn.Module) -> float:
        return sparsekern.perplexity(model.float(), evaluation, length=min(smollm2.WINDOW, len(evaluation)))

    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        path = Path(folder) / "model.gguf"
        model = smollm2.dense_model()
        for row, type in BY_LLAMA.items():
            sparsekern.export_gguf(model, path, tokenizer=words, type=type, overwrite=True)
            keep(row, *sizes(path), perplexity(sparsekern.load(path, device="cpu")), llama_speed(build, path))
        if build is not None:
            quantizer = program_of(build, "llama-quantize")
            source = sparsekern.export_gguf(model, Path(folder) / "f32.gguf", tokenizer=words, type="f32")
            subprocess.run([quantizer, source, path, "Q4_K_M", str(THREADS)], check=True, capture_output=True)
            keep(K_QUANT, *sizes(path), perplexity(sparsekern.load(path, device="cpu")), llama_speed(build, path))
        half = model.bfloat16()
        keep(DENSE, 16.0, weight_bytes(half) / 1e6, None, own_speed(half))
        keep(DENSE, None, None, perplexity(half), None)
        for row, (pattern, options) in OURS.items():
            model = smollm2.dense_model()
            sparsekern.prune(model, None, pattern, calibration, quality=preset, progress=False, **options)
            found = perplexity(copy.deepcopy(model).bfloat16())
            if options:
                sparsekern.export_gguf(model, path, tokenizer=words, type="q8_0", overwrite=True)
                keep(Q4_0, *sizes(path), perplexity(sparsekern.load(path, device="cpu")), llama_speed(build, path))
            packed = sparsekern.pack(model.bfloat16())
            keep(row, bits(packed), weight_bytes(packed) / 1e6, found, own_speed(packed))
    return figures


def bits(model: torch.nn.Module) -> float:
    """Return the bits a weight of packed linears."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return 8 * sum(weight_bytes(layer) for layer in layers) / sum(torch.Size(layer.shape).numel() for layer in layers)


def sizes(path: Path) -> tuple[float, float]:
    """Return the bits a weight of the matrices in the blocks of a GGUF file, and the megabytes of the file."""
    from gguf import GGUFReader

    found = [tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in found) / sum(int(t.n_elements) for t in found), path.stat().st_size / 1e6


def own_speed(model: torch.nn.Module) -> float:
    """Return the tokens a second of `generate`, one at a time, the median of some rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    taken = [seconds_of_token(model, TOKENS) for _ in range(ROUNDS + 1)]
    torch.set_num_threads(before)
    return 1 / statistics.median(taken[1:])  # the first round warms up


def llama_speed(build: Path | None, path: Path) -> float | None:
    """Return the tokens a second of llama.cpp, one at a time, the median of some rounds; None without a build."""
    if build is None:
        return None
    program = program_of(build)
    return 1 / statistics.median(seconds_of_llama_cpp(program, path, TOKENS, THREADS) for _ in range(ROUNDS))


def section(figures: dict[str, object]) -> str:
    lines = [
        "## What zeros and 4 bits cost and buy",
        "",
        "SmolLM2-135M-Instruct, whose file has 4 bits already (Q4_1), so that Q8_0 and Q4_0 cost less here than elsewhere. Bits of the linears in",
        f"the blocks; megabytes of all weights (embeddings bf16, in llama.cpp's formats Q8_0). Calibration {smollm2.SAMPLES} x {smollm2.LENGTH} tokens of",
        f"WikiText-2 `valid`, seed 0; perplexity of the stored numbers in float32 on the first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test`.",
        f"One token at a time on {THREADS} threads: transformers' `generate` for bf16 and ours, `llama-bench` for llama.cpp's formats.",
        "",
        f"| stored as | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for row in ROWS:
        values: list[Any] = [figures.get(f"{row}, {column}") for column in COLUMNS]
        cells = [shown(value, format) for value, format in zip(values, (".2f", ".0f", ".2f", ".1f"), strict=True)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="with the programs llama-bench and llama-quantize")
    parser.add_argument("--quality", default="fast", choices=("fast", "good", "best"), help="how ours is pruned (fast)")
    parser.add_argument("--quick", action="store_true", help="a smaller problem; nothing is kept")
    arguments = parser.parse_args()
    figures = measure(arguments.folder, arguments.llama_cpp, arguments.quality, arguments.quick)
    print(section(figures if arguments.quick else stored(NAME)))


if __name__ == "__main__":
    main()
