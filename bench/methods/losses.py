"""What zeros and few bits cost and buy on SmolLM2-135M: `python -m bench.methods.losses FOLDER --llama-cpp BUILD --work FILES`.

FOLDER holds `valid.txt` and `test.txt` of WikiText-2. BUILD is a folder in which llama.cpp was built with its programs `llama-bench` and
`llama-quantize`; without it the speeds of its formats and Q4_K_M are not measured. For each way to store the model: bits a weight of the
linears in the blocks, the whole file, perplexity of the stored numbers in float32, and tokens a second, one at a time, on two threads.

First the models are made, in the folder FILES, where those of an earlier run are found again, and their perplexities are measured. This
takes most of the time, and may share the machine: `--only files`. Then all sides are timed in turns: `--only times`.

The weights of this model come from a file whose linears have 4 bits already (Q4_1), so that what 4 bits cost a dense model is less here
than it is elsewhere.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.runtime import SparseLinear, weight_bytes

from .. import quality, smollm2
from ..llama_cpp import program_of, quantise, seconds_of_llama_cpp, seconds_of_token
from . import Unavailable, shown, store, stored

NAME = "losses"
DENSE, PACKED_Q4, Q4_0 = "dense, bf16", "2:4, 4 bits", "2:4, 4 bits, as Q4_0"
BY_LLAMA = {"dense, Q8_0": "Q8_0", "dense, Q4_0": "Q4_0", "dense, Q4_K_M": "Q4_K_M"}
PRUNED: dict[str, tuple[str | float, dict[str, Any]]] = {
    "50 %, bf16": (0.5, {}),
    "2:4, bf16": ("2:4", {}),
    PACKED_Q4: ("2:4", {"values": "int4"}),
}
OURS = (DENSE, *PRUNED)
ROWS = (DENSE, *BY_LLAMA, *PRUNED, Q4_0)
THREADS, TOKENS, ROUNDS = 2, 48, 5
MOST_BY_VALUES = 0.06
COLUMNS = ("bits a weight", "MB", "perplexity", "tokens a second")


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        figures = measure(wikitext, None, Path(folder), quick=quick)
    return section(figures)


def measure(
    wikitext: Path, build: Path | None, files: Path, preset: str = "fast", quick: bool = False, only: str | None = None
) -> dict[str, object]:
    """Return the figures by row and column. Those of a row are stored when they are known, unless `quick`."""
    words = smollm2.tokenizer()
    calibration, evaluation = quality.calibration(wikitext, words), quality.evaluation(wikitext, words)
    if quick:
        calibration, evaluation = calibration[:2, :128], evaluation[:256]
    figures: dict[str, object] = {}

    def keep(row: str, **values: float) -> None:
        found = {f"{row}, {column}": value for column, value in values.items()}
        if not quick:
            store(NAME, found)
        figures.update(found)
        print(row, values, flush=True)

    paths = {row: files / name_of(row) for row in ROWS if build is not None or row not in BY_LLAMA}
    files.mkdir(parents=True, exist_ok=True)
    for row, path in paths.items() if only != "times" else ():
        if not path.exists():
            make(row, paths, build, calibration, preset)
        bits, megabytes = sizes(path) if path.is_file() else sizes_of_ours(sparsekern.load(path, device="cpu"))
        model = sparsekern.unpack(sparsekern.load(path, dtype="float32", device="cpu"))
        found = sparsekern.perplexity(model, evaluation, length=min(smollm2.WINDOW, len(evaluation)))
        keep(row, **dict(zip(COLUMNS, (bits, megabytes, found), strict=False)))
    if only != "files":
        for row, seconds in times(paths, build, 1 if quick else ROUNDS).items():
            keep(row, **{COLUMNS[-1]: 1 / statistics.median(seconds)})
    return figures


def name_of(row: str) -> str:
    """Return the name of the file or folder of a row."""
    plain = row.replace(" %", "%").replace(", ", "-").replace(" ", "-").replace(":", "of")
    return plain if row in OURS else f"{plain}.gguf"


def make(row: str, paths: dict[str, Path], build: Path | None, calibration: torch.Tensor, preset: str) -> None:
    """Write the model of a row: a folder of ours in bfloat16, or a GGUF file."""
    path, words = paths[row], smollm2.tokenizer()
    if row == Q4_0:  # the numbers of the folder, whose scales a dense half model would round
        model = sparsekern.load(paths[PACKED_Q4], device="cpu")
        sparsekern.export_gguf(model, path, tokenizer=words, type="q8_0")
    elif row in BY_LLAMA and build is not None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            dense = sparsekern.export_gguf(smollm2.dense_model(), Path(folder) / "dense.gguf", tokenizer=words, type="f32")
            quantise(build, dense, Path(folder) / path.name, BY_LLAMA[row]).replace(path)
    else:
        model = smollm2.dense_model()
        if row in PRUNED:
            pattern, options = PRUNED[row]
            sparsekern.prune(model, None, pattern, calibration, quality=preset, progress=False, **options)
            model = sparsekern.pack(model)  # in float32, so that scales of 4-bit values stay as they are
        sparsekern.save(model.to(torch.bfloat16), path, format="packed" if row in PRUNED else "dense")


def times(paths: dict[str, Path], build: Path | None, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a token of each side in each round, taken in turns after a round that warms up."""
    sides: dict[str, Callable[[], float]] = {
        row: partial(seconds_of_token, sparsekern.load(path, device="cpu"), TOKENS) for row, path in paths.items() if row in OURS
    }
    if build is not None:
        program = program_of(build)
        sides |= {
            row: partial(seconds_of_llama_cpp, program, path, TOKENS, THREADS) for row, path in paths.items() if row not in OURS
        }
    before, taken = torch.get_num_threads(), {}
    torch.set_num_threads(THREADS)
    for turn in range(rounds + 1):
        for row, seconds_of in sides.items():
            seconds = seconds_of()
            if turn:
                taken.setdefault(row, []).append(seconds)
    torch.set_num_threads(before)
    return taken


def sizes_of_ours(model: torch.nn.Module) -> tuple[float, float]:
    """Return the bits a weight of the packed linears, 16 where there are none, and the megabytes of all weights."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    weights = sum(torch.Size(layer.shape).numel() for layer in layers)
    return 8 * sum(map(weight_bytes, layers)) / weights if layers else 16.0, weight_bytes(model) / 1e6


def sizes(path: Path) -> tuple[float, float]:
    """Return the bits a weight of the matrices in the blocks of a GGUF file, and the megabytes of the file."""
    from gguf import GGUFReader

    found = [tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in found) / sum(int(t.n_elements) for t in found), path.stat().st_size / 1e6


def section(figures: dict[str, object]) -> str:
    lines = [
        "## What zeros and 4 bits cost and buy",
        "",
        "SmolLM2-135M-Instruct, whose file has 4 bits already (Q4_1), so that Q8_0 and Q4_0 cost less here than elsewhere. Bits of the linears in",
        f"the blocks; megabytes of all weights (embeddings bf16, in llama.cpp's formats Q8_0). Calibration {smollm2.SAMPLES} x {smollm2.LENGTH} tokens of",
        f"WikiText-2 `valid`, seed 0; perplexity of the stored numbers in float32 on the first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test`.",
        f"One token at a time on {THREADS} threads, all in turns: transformers' `generate` for bf16 and ours, `llama-bench` for llama.cpp's",
        "formats. These are made by `llama-quantize`, but the last, which `export_gguf` writes.",
        "",
        f"| stored as | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for row in ROWS:
        values: list[Any] = [figures.get(f"{row}, {column}") for column in COLUMNS]
        cells = [shown(value, format) for value, format in zip(values, (".2f", ".0f", ".2f", ".1f"), strict=True)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    pruned: list[Any] = [figures.get(f"{row}, perplexity") for row in ("2:4, bf16", PACKED_Q4)]
    if None not in pruned:
        lines += [
            "",
            f"4 bits add {math.log(pruned[1] / pruned[0]):.3f} to the log-perplexity of 2:4 (goal: at most {MOST_BY_VALUES}).",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="with the programs llama-bench and llama-quantize")
    parser.add_argument("--work", type=Path, metavar="FILES", help="where the models are kept; nowhere by default")
    parser.add_argument("--quality", default="fast", choices=("fast", "good", "best"), help="how ours is pruned (fast)")
    parser.add_argument("--only", choices=("files", "times"), help="make the files and measure perplexities, or time what there is")
    parser.add_argument("--quick", action="store_true", help="a smaller problem; nothing is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        files, build = arguments.work or Path(folder), arguments.llama_cpp
        figures = measure(arguments.folder, build, files, arguments.quality, arguments.quick, arguments.only)
    print(section(figures if arguments.quick else stored(NAME)))


if __name__ == "__main__":
    main()
