"""The picture at the top of the README: a few rows of a committed table, as bars. `python -m bench.overview` redraws it."""

from __future__ import annotations

import json
from pathlib import Path

from sparsekern.reports.plots import Bar, bars

RESULTS = Path(__file__).with_name("results")
TABLE = RESULTS / "intel-xeon-processor-3.00ghz-cpu.json"
PICTURE = RESULTS / "overview.svg"
SHOWN = {  # row of the table -> label
    "reverse_cholesky + obs_sweep 4096x4096 0.5": "SparseGPT, a 4096 x 4096 linear to 50 %, vs published algorithm",
    "SmolLM2-135M, SparseGPT 2:4, 32 x 512 tokens: the whole call": "prune SmolLM2-135M to 2:4, vs llm-compressor",
    "bitmask_linear 50% zeros, 1 token, 4096x4096 bfloat16, against F.linear": "one token, packed 4096 x 4096 bf16 at 50 %, vs F.linear",
    "gram_ bfloat16 [16384, 4096]": "Gram matrix, bf16, vs x.float().T @ x.float()",
    "LLaMA-shaped, 1.04 B random weights, 50 %: generate(), one token at a time": "generate(), 1.04 B weights packed, vs dense",
    "SmolLM2-135M, 50 % by SparseGPT: generate(), one token at a time": "generate(), SmolLM2-135M packed, vs dense",
}


def picture() -> str:
    """Return the bars as SVG: how many times faster each row is than what it is compared with."""
    rows = {row["what"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]}
    shown = []
    for what, label in SHOWN.items():
        times = rows[what]["reached"].partition("x")[0]
        shown.append(Bar(label, float(times), f"{times} times as fast", "#2f78b7"))
    return bars(shown, width=820) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
