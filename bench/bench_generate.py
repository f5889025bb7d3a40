"""`generate()` with 2:4 weights of 4 bits against llama.cpp's Q4_0: `python -m bench.bench_generate --llama-cpp BUILD`.

BUILD is a folder in which llama.cpp was built for this CPU with the targets `llama-bench` and `llama-quantize`, as `bench.peers` says.

A LLaMA-shaped model of a billion random weights is run by three sides, which take turns: packed, dense in bfloat16, and as Q4_0 by
`llama-bench`. The linears of ours and of llama.cpp hold the same numbers, the dense ones round them. The head, which is tied to the
embeddings, has 8 bits in ours as `pack(head="int8")` makes it (`--head bf16` leaves it as it is), and is Q6_K in llama.cpp's file, as
`llama-quantize` stores it. A token's time is split into that of the packed linears called one after another, that of the head alone, and
the rest: attention, norms and the Python of transformers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sparsekern.measure.generate import random_prompt
from sparsekern.runtime import SparseLinear

from . import results
from .llama_cpp import program_of, seconds_of_llama_cpp, seconds_of_token
from .llama_model import Sizes, dense_model, packed_model, with_head, write_gguf
from .results import Row

SECTION = "4-bit values against llama.cpp"
VOCABULARIES = (32_000, 128_256)
GOALS = {"llama.cpp Q4_0": 0.9, "dense bfloat16": 4.0}
THREADS = 2
BF16 = "bf16"
HEADS = ("int8", BF16)
TOY = Sizes(hidden=256, inner=512, blocks=2, heads=4, groups=2)


@dataclass
class Taken:
    """Seconds of one token, in each round.

    Attributes:
        sides: of each side that generates.
        parts: of the parts of our token.
    """

    sides: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)


def measure(sides: dict[str, Callable[[], float]], parts: dict[str, Callable[[], float]], rounds: int) -> Taken:
    """Time sides and parts in turns, after one round that warms up."""
    taken = Taken()
    for turn in range(rounds + 1):
        for kept, given in ((taken.sides, sides), (taken.parts, parts)):
            for name, run in given.items():
                seconds = run()
                if turn:
                    kept.setdefault(name, []).append(seconds)
    return taken


@torch.no_grad()
def seconds_of_linears(model: nn.Module) -> float:
    """Return the seconds that the packed linears of one token take with nothing between them."""
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, SparseLinear)]
    given = {layer.in_features: torch.randn(1, 1, layer.in_features, dtype=torch.bfloat16) for layer in layers}
    begin = time.perf_counter()
    for layer in layers:
        layer(given[layer.in_features])
    return time.perf_counter() - begin


@torch.no_grad()
def seconds_of_head(model: nn.Module) -> float:
    """Return the seconds that the head takes for one token."""
    head = model.lm_head
    x = torch.randn(1, 1, head.in_features, dtype=torch.bfloat16)
    begin = time.perf_counter()
    head(x)
    return time.perf_counter() - begin


def rows_of(what: str, taken: Taken) -> list[Row]:
    """Return a row for each side that ours is compared with, and one of the parts of our token."""
    ours = taken.sides["ours"]
    found = []
    for name, theirs in taken.sides.items():
        if name == "ours":
            continue
        ratio, goal = min(statistics.median(theirs) / statistics.median(ours), min(theirs) / min(ours)), GOALS[name]
        found.append(
            Row(
                SECTION,
                f"{what}: generate(), one token at a time, {THREADS} threads, against {name}",
                f"{ratio:.2f}x ({1 / statistics.median(ours):.1f} tokens/s)",
                f"{name} {1 / statistics.median(theirs):.1f} tokens/s",
                f">= {goal}x",
                ratio >= goal,
                {"ours": ours, "theirs": theirs, "goal": goal},
            )
        )
    medians = {name: statistics.median(seconds) for name, seconds in taken.parts.items()}
    rest = statistics.median(ours) - sum(medians.values())
    split = ", ".join(f"{name} {results.seconds(seconds)}" for name, seconds in [*medians.items(), ("the rest", rest)])
    found.append(Row(SECTION, f"{what}: parts of a token", split, details={"parts": taken.parts}))
    return found


def compare(build: Path | None, sizes: Sizes, tokens: int, rounds: int, head: str) -> list[Row]:
    """Check and time the sides of a model."""
    dense = dense_model(sizes)
    as_linears = packed_model(dense)  # llama-quantize reads no embeddings of 8 bits
    packed = as_linears if head == BF16 else with_head(as_linears)
    check_logits(dense, packed)
    sides = {"ours": partial(seconds_of_token, packed, tokens), "dense bfloat16": partial(seconds_of_token, dense, tokens)}
    parts = {"linears": partial(seconds_of_linears, packed), "head": partial(seconds_of_head, packed)}
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        if build is not None:
            file = Path(folder) / "model.gguf"
            write_gguf(as_linears, build, file)
            sides["llama.cpp Q4_0"] = partial(seconds_of_llama_cpp, program_of(build), file, tokens, THREADS)
        taken = measure(sides, parts, rounds)
    count = sum(weight.numel() for weight in dense.parameters()) / 1e9
    what = f"LLaMA-shaped, {count:.2f} B random weights, vocabulary {sizes.vocabulary:,}, 2:4 with 4-bit values"
    return rows_of(what if head == BF16 else f"{what}, head of 8 bits", taken)


@torch.no_grad()
def check_logits(dense: nn.Module, packed: nn.Module) -> None:
    """Raise AssertionError unless the packed model's logits are the dense one's, but for activations of 8 bits."""
    prompt = random_prompt(dense, 4)
    expected, found = (model(input_ids=prompt, use_cache=False).logits.float() for model in (dense, packed))
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.1, f"logits: expected those of the dense model within 10 %, got {error:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="without it, only our own sides are compared")
    parser.add_argument("--vocabulary", type=int, action="append", help="may be given more than once; 32000 and 128256 by default")
    parser.add_argument("--head", choices=HEADS, default=HEADS[0], help="of the packed side")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures go; nowhere by default")
    parser.add_argument("--quick", action="store_true", help="a toy model; nothing is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    run, found = results.this_run(), []
    for vocabulary in arguments.vocabulary or VOCABULARIES:
        sizes = replace(TOY if arguments.quick else Sizes(), vocabulary=vocabulary)
        found += compare(arguments.llama_cpp, sizes, arguments.tokens, arguments.rounds, arguments.head)
    print(results.as_table(results.title_of(run), [replace(row, run=run) for row in found]))
    if arguments.out and not arguments.quick:
        print(results.record(found, arguments.out, run))


if __name__ == "__main__":
    main()
