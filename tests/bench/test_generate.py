from __future__ import annotations

from bench.bench_generate import Taken, rows_of


def test_the_smaller_of_both_ratios_decides_and_the_rest_is_what_no_part_took():
    taken = Taken(
        {"ours": [0.04, 0.05, 0.09], "dense bfloat16": [0.2, 0.22, 0.24], "llama.cpp Q4_0": [0.03, 0.06, 0.07]},
        {"linears": [0.02, 0.02, 0.08], "head": [0.01, 0.01, 0.01]},
    )
    dense, peer, parts = rows_of("a model", taken)
    assert dense.reached == "4.40x (20.0 tokens/s)" and dense.met and dense.against == "dense bfloat16 4.5 tokens/s"
    assert peer.reached == "0.75x (20.0 tokens/s)" and not peer.met
    assert parts.reached == "linears 20 ms, head 10 ms, the rest 20 ms"
