"""2:4 weights of 4 bits against llama.cpp's products of one token: `python -m bench.peers --llama-cpp BUILD`.

BUILD is a folder in which llama.cpp was built with shared libraries for this CPU, such as
`cmake -S llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON && cmake --build BUILD --target ggml`
(targets `llama-bench` and `llama-quantize` for `bench.bench_generate`, which needs no shared libraries).

Every side multiplies by the same numbers: ours packed as 2:4 with 4 bits, Q4_0 the same weights without loss, Q8_0 and bfloat16 the same
weights rounded. The results are compared first. Each side has copies that together exceed the caches, and they take turns, round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.layouts.q4_0 import q4_0_rows
from sparsekern.ops import nm_q4_linear, nm_q4_pack, nm_q4_unpack

from . import results
from .ggml import Q4_0, Q8_0, Ggml, Products
from .inputs import n_of_m
from .results import Row

SECTION = "4-bit values against llama.cpp"
SHAPES = ((4096, 4096), (11008, 4096))
GOALS = {"Q4_0": 1.25, "Q8_0": 2.2, "F.linear bfloat16": 4.0}
CACHED = 200e6  # bytes of all copies of a side together, at least
OURS = "ours"

Side = Callable[[int], object]  # multiplies by all copies with so many threads


def sides(ggml: Ggml, rows: int, columns: int, wanted: str) -> dict[str, tuple[Side, int]]:
    """Return each side's products and the number of its copies, after comparing their results."""
    generator = torch.Generator().manual_seed(0)
    dense = n_of_m(torch.randn(rows, columns, generator=generator))
    scales = (dense.view(rows, -1, COLUMNS).abs().amax(-1) / 7).half()
    blocks = nm_q4_pack(dense, scales, 2, 4)
    weight, _ = nm_q4_unpack(blocks, 2, 4, rows, columns)
    x = torch.randn(1, columns, generator=generator)
    exact = (x.double() @ weight.double().T)[0]
    buffers = ggml.buffer_types()
    buffer = buffers.get(wanted) or next(iter(buffers.values()))
    packed = [blocks.clone() for _ in range(_copies(blocks.nbytes))]
    made: dict[str, tuple[Side, int]] = {OURS: (lambda threads: [nm_q4_linear(x, own, 2, 4, rows) for own in packed], len(packed))}
    for name, kind, stored, place in (
        ("Q4_0", Q4_0, q4_0_rows(weight, scales).flatten(), buffer),
        ("Q8_0", Q8_0, ggml.quantised(Q8_0, weight), ggml.backend_cpu_buffer_type()),  # x86 repacks no Q8_0
    ):
        products = Products(ggml, kind, place, [stored] * _copies(stored.nbytes), rows, x)
        products(2)
        _assert_close(name, products.result(-1), exact)
        made[name] = products, len(products.outputs)
    half = [weight.bfloat16() for _ in range(_copies(2 * weight.numel()))]
    made["F.linear bfloat16"] = (lambda threads: [torch.nn.functional.linear(x.bfloat16(), own) for own in half], len(half))
    _assert_close(OURS, nm_q4_linear(x, blocks, 2, 4, rows)[0], exact)
    return made


def _copies(size: int) -> int:
    return int(-(-CACHED // size))


def _assert_close(name: str, found: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < 0.01, f"{name}: expected the product within 1 % (activations have 8 bits), got {error:.1%}"


def compare(made: dict[str, tuple[Side, int]], threads: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one product in each round of each side."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for turn in range(rounds + 1):
        for name, (side, copies) in made.items():
            begin = time.perf_counter()
            side(threads)
            if turn:  # the first round warms up
                taken[name].append((time.perf_counter() - begin) / copies)
    torch.set_num_threads(before)
    return taken


def rows_of(shape: tuple[int, int], threads: int, taken: dict[str, list[float]]) -> list[Row]:
    """Return a row for each side that ours is compared with."""
    found, ours = [], taken[OURS]
    for name, goal in GOALS.items():
        theirs = taken[name]
        by_median, by_least = statistics.median(theirs) / statistics.median(ours), min(theirs) / min(ours)
        ratio = min(by_median, by_least)
        rate = shape[0] * shape[1] * 3.25 / 8 / min(ours) / 1e9
        found.append(
            Row(
                SECTION,
                f"nm_q4_linear 2:4, 1 token, {shape[0]}x{shape[1]}, {threads} thread{'s' * (threads > 1)}, against {name}",
                f"{ratio:.2f}x ({results.seconds(statistics.median(ours))}, at best {rate:.1f} GB/s of packed bytes)",
                f"{name} {results.seconds(statistics.median(theirs))}",
                f">= {goal}x",
                ratio >= goal,
                {"median": by_median, "least": by_least, "ours": ours, "theirs": theirs, "goal": goal},
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="BUILD", help="with libggml-base.so and libggml-cpu.so")
    parser.add_argument(
        "--buffer", default="", metavar="NAME", help="ggml's buffer for Q4_0, such as CPU_REPACK; the first by default"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, action="append", help="may be given more than once; 1 and 2 by default")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures go; nowhere by default")
    arguments = parser.parse_args()
    ggml, run, found = Ggml(arguments.llama_cpp), results.this_run(), []
    print("ggml's buffers:", ", ".join(ggml.buffer_types()))
    for shape in SHAPES:
        made = sides(ggml, *shape, arguments.buffer)
        for threads in arguments.threads or (1, 2):
            found += rows_of(shape, threads, compare(made, threads, arguments.rounds))
    print(results.as_table(results.title_of(run), [replace(row, run=run) for row in found]))
    if arguments.out:
        print(results.record(found, arguments.out, run))


if __name__ == "__main__":
    main()
