"""Runs of several ranks: the same bits as one process."""

from __future__ import annotations

import pytest

from .pool import succeeded
from .runs import digests, pruned

RUN = "tests.ranks.runs:pruned"


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "copal", "magnitude"])
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, tmp_path, method):
    expected, alone = pruned(0, method, out=tmp_path / "1")
    for size in (2, 4):
        out = tmp_path / str(size)
        for digest, report in succeeded(ranks.run(size, RUN, method, out)):
            assert digest == expected
            assert [layer["error"] for layer in report["layers"]] == [layer["error"] for layer in alone["layers"]]
        assert digests(out) == digests(tmp_path / "1")
