from __future__ import annotations

import torch
from torch.nn.functional import linear

from sparsekern.ops import cusparselt_linear

from ..inputs import CHECKED, assert_close, n_of_m
from ..problem import Case, NotHere, Place, Problem

DENSE = "dense cuBLAS"


def compressed_linear(place: Place, tokens: int, rows: int, columns: int) -> Problem:
    """A product with a weight that cuSPARSELt has compressed; copies of the layer take turns, so that none is in a cache."""
    if place.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        raise NotHere("cusparselt_linear needs a GPU and a PyTorch that has cuSPARSELt")
    weight = n_of_m(place.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    copies = place.copies(weight.nbytes * 9 // 16)
    compressed = [torch._cslt_compress(weight) for _ in copies]
    dense = [weight.clone() for _ in copies]
    return Problem(
        calls=[lambda c=c: cusparselt_linear(x, c, rows) for c in compressed],
        check=lambda result: assert_close(result[:CHECKED].double(), x[:CHECKED].double() @ weight.double().T, 4e-3),
        baselines={DENSE: [lambda w=w: linear(x, w) for w in dense]},
        flops=tokens * rows * columns,  # half of the dense product's
        read=x.nbytes + compressed[0].nbytes,
        written=tokens * rows * x.element_size(),
        unit="bf16",
    )


CASES = [
    Case(
        f"cusparselt_linear, {tokens} tokens, 11008x4096 bfloat16",
        compressed_linear,
        {"tokens": tokens, "rows": 11008, "columns": 4096},
        {"tokens": 64, "rows": 128, "columns": 128},
        op="cusparselt_linear",
        cuda={DENSE: None},
    )
    for tokens in (128, 4096)
]


def test_cusparselt_linear(timed, case):
    timed(case)
