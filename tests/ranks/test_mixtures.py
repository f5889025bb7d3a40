"""Experts dealt to ranks: the same bits for any number of ranks, and each expert sees the tokens that it sees in one process."""

from __future__ import annotations

import pytest

from sparsekern import ExpertPruning, SparseGPT
from sparsekern.pruning.checkpoint import Checkpoint
from tests import tiny

from .mixtures import pruned, removed
from .pool import succeeded
from .runs import digests

RUN, REMOVE = "tests.ranks.mixtures:pruned", "tests.ranks.mixtures:removed"


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
        ("wanda", {"pattern": 0.5, "allocation": "fisher"}, False, (2, 4)),
        ("wanda", {"pattern": "4:8", "allocation": "mixed"}, False, (2,)),
    ],
    ids=str,
)
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, folder, tmp_path, method, options, stream, sizes):
    expected = pruned(0, folder, method, tmp_path / "1", options, stream)
    for size in sizes:
        out = tmp_path / str(size)
        assert succeeded(ranks.run(size, RUN, folder, method, out, options, stream)) == [expected] * size
        assert digests(out) == digests(tmp_path / "1")


def test_ranks_of_unequal_memory_agree_on_what_is_solved_together(ranks, folder, tmp_path):
    expected = pruned(0, folder, "sparsegpt", tmp_path / "1")
    case = "tests.ranks.mixtures:pruned_with_unequal_memory"
    assert succeeded(ranks.run(2, case, folder, "sparsegpt", tmp_path / "2")) == [expected] * 2
    assert digests(tmp_path / "2") == digests(tmp_path / "1")


def test_every_rank_keeps_hidden_states_in_the_folder_of_the_run(ranks, folder, tmp_path):
    out = tmp_path / "out"
    assert succeeded(ranks.run(2, "tests.ranks.mixtures:shelves", folder, out)) == [[str(out)]] * 2


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


def test_four_ranks_remove_the_experts_that_one_does(ranks, folder, tmp_path):
    options = {"then": "sparsegpt", "pattern": "2:4"}
    expected = removed(0, folder, ExpertPruning(remove=0.3), tmp_path / "1", options)
    answers = succeeded(ranks.run(4, REMOVE, folder, ExpertPruning(remove=0.3), tmp_path / "4", options))
    assert answers == [expected] * 4
    assert digests(tmp_path / "4") == digests(tmp_path / "1")


def test_ranks_remove_experts_of_a_streamed_model(ranks, folder, tmp_path):
    arguments = {"then": "wanda", "pattern": "2:4"}, True
    expected = removed(0, folder, ExpertPruning(remove=0.3), tmp_path / "1", *arguments)
    answers = succeeded(ranks.run(2, REMOVE, folder, ExpertPruning(remove=0.3), tmp_path / "2", *arguments))
    assert answers == [expected] * 2
    assert digests(tmp_path / "2") == digests(tmp_path / "1")


def test_scores_are_those_of_one_process(ranks, folder):
    _, alone, _, _ = removed(0, folder, ExpertPruning(), None, {"leaves": 1})
    (_, found, _, _), _ = succeeded(ranks.run(2, REMOVE, folder, ExpertPruning()))
    for (name, scores, *rest), (other, own_scores, *own_rest) in zip(found, alone, strict=True):
        assert (name, rest) == (other, own_rest)
        assert scores == pytest.approx(own_scores, rel=1e-12)


def test_a_removal_goes_on_with_another_number_of_ranks(ranks, folder, tmp_path, monkeypatch):
    options = {"then": "sparsegpt", "pattern": "2:4"}
    expected = removed(0, folder, ExpertPruning(), tmp_path / "1", options)

    def interrupted(self, number, result, save=Checkpoint.save):
        save(self, number, result)
        if (self.stage, number) == ("then-", 1):
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Checkpoint, "save", interrupted)
        removed(0, folder, ExpertPruning(), tmp_path / "2", options)
    answers = succeeded(ranks.run(2, REMOVE, folder, ExpertPruning(), tmp_path / "2", options | {"resume": True}))
    assert [answer[:3] for answer in answers] == [expected[:3]] * 2
    assert digests(tmp_path / "2") == digests(tmp_path / "1")
    assert {answer[3] for answer in answers} == {3}
