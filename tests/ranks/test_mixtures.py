"""Experts dealt to ranks: the same bits for any number of ranks, and each expert sees the tokens that it sees in one process."""

from __future__ import annotations

import pytest

import sparsekern
from sparsekern import SparseGPT
from tests import tiny

from .mixtures import pruned
from .pool import succeeded
from .runs import digests, state_digest

RUN = "tests.ranks.mixtures:pruned"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of two blocks with six experts, which ranks share unevenly."""
    return str(tiny.save_mixture(tmp_path_factory.mktemp("mixture") / "model", experts=6))


@pytest.mark.parametrize(
    ("method", "options", "stream", "sizes"),
    [
        ("sparsegpt", {}, False, (2, 4)),
        ("wanda", {"pattern": 0.5, "weighting": "routing"}, False, (4,)),
        (SparseGPT(scope="matrix"), {"pattern": 0.5}, True, (2,)),
    ],
    ids=str,
)
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, folder, tmp_path, method, options, stream, sizes):
    expected = pruned(0, folder, method, tmp_path / "1", options, stream)
    for size in sizes:
        out = tmp_path / str(size)
        assert succeeded(ranks.run(size, RUN, folder, method, out, options, stream)) == [expected] * size
        if stream:  # whose files hold seconds
            assert state_digest(sparsekern.load(out)) == state_digest(sparsekern.load(tmp_path / "1"))
        else:
            assert digests(out) == digests(tmp_path / "1")


def test_experts_are_solved_as_in_one_process_without_leaves(ranks, folder):
    """Their tokens come in the order of the batches, however many leaves there are; other linears differ in the last bits."""
    _, alone = pruned(0, folder, "wanda", None, {"leaves": 1})
    (_, found), _ = succeeded(ranks.run(2, RUN, folder, "wanda"))
    assert [layer for layer in found if ".experts." in layer[0]] == [layer for layer in alone if ".experts." in layer[0]]


@pytest.mark.filterwarnings("ignore:no calibration token reached")
def test_an_expert_is_unseen_only_if_no_rank_has_a_token_for_it(ranks, folder):
    arguments = (folder, "wanda", None, {"unseen": "dense"}, False, 2)
    expected = pruned(0, *arguments)
    dense = [layer[0] for layer in expected[1] if layer[1] == "dense"]
    assert 0 < len(dense) < len(expected[1]) and all(".experts." in name for name in dense)
    assert succeeded(ranks.run(4, RUN, *arguments)) == [expected] * 4
