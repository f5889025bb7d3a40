"""One dataset after another on several ranks: the same bits as one process, state, perplexities and all."""

from __future__ import annotations

import pytest

from tests.tiny import save_folder, save_mixture

from .datasets import taught
from .pool import succeeded
from .runs import digests

RUN = "tests.ranks.datasets:taught"
NAMES = ["a", "the second"]


@pytest.mark.parametrize(
    ("method", "options", "sizes"),
    [
        ("copal", {}, (2, 4)),
        ("sparsegpt", {}, (4,)),
        ("wanda", {"strategy": "carry"}, (2,)),
        ("magnitude", {"strategy": "dense"}, (2,)),
    ],
    ids=str,
)
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, method, options, sizes):
    expected = taught(0, method, NAMES, options)
    for size in sizes:
        assert succeeded(ranks.run(size, RUN, method, NAMES, options)) == [expected] * size


def test_a_state_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    expected = taught(0, "copal", NAMES)
    options = {"state": tmp_path / "state"}
    assert ranks.run(4, RUN, "copal", NAMES, options, None, 3) == ["killed"] * 4  # in the second dataset, at its last block
    options |= {"resume": True, "out": tmp_path / "out"}
    assert succeeded(ranks.run(2, RUN, "copal", NAMES, options)) == [expected] * 2
    third = {"state": tmp_path / "state"}
    (digest, *_), *others = succeeded(ranks.run(4, RUN, "copal", ["third one"], third))
    assert digest == taught(0, "copal", [*NAMES, "third one"])[0]
    assert [other[0] for other in others] == [digest] * 3


def test_a_streamed_model_gives_the_same_files(ranks, tmp_path):
    source = save_folder(tmp_path / "source", num_hidden_layers=2)
    found = []
    for size in (1, 2):
        options = {"state": tmp_path / f"state {size}", "out": tmp_path / f"out {size}"}
        found += (
            [taught(0, "copal", NAMES, options, source)]
            if size == 1
            else succeeded(ranks.run(2, RUN, "copal", NAMES, options, source))
        )
    assert found == [found[0]] * 3
    assert digests(tmp_path / "out 2") == digests(tmp_path / "out 1")


def test_what_one_process_alone_can_do_is_refused(ranks, tmp_path):
    source = save_mixture(tmp_path / "mixture")
    options = {"state": tmp_path / "state", "evaluate": None}
    for kind, message, _ in ranks.run(2, RUN, "wanda", NAMES, options, source):
        assert (kind, message) == (
            "ValueError",
            "model: expected a single process, got 2 ranks; sums of statistics of fused experts are kept by one process",
        )
