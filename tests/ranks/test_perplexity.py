"""The same perplexity and fidelity to the last bit, however many processes share the windows."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from tests import tiny

CASE = "tests.ranks.cases:perplexed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save_folder(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("windows", [7, 3])  # neither is a multiple of the processes, and 3 leave one of 4 without any
def test_the_figure_does_not_depend_on_the_number_of_processes(ranks, folder, generator, windows, stream):
    ids = torch.randint(320, (windows * 16,), generator=generator)
    expected = sparsekern.perplexity(sparsekern.load(folder), ids, 16)
    for size in (2, 4):
        assert ranks.run(size, CASE, folder, ids, 16, stream) == [expected] * size


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_fidelity_does_not_depend_on_the_number_of_processes(ranks, folder, tmp_path, generator, stream):
    ids = torch.randint(320, (7 * 16,), generator=generator)
    dense = sparsekern.load(folder)
    model = sparsekern.load(folder)
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    model.save_pretrained(tmp_path / "pruned")
    expected = sparsekern.fidelity(model, dense, ids, 16)
    assert expected.divergence > 0
    for size in (2, 4):
        found = ranks.run(size, "tests.ranks.cases:compared", str(tmp_path / "pruned"), folder, ids, 16, stream)
        assert found == [expected] * size


def test_the_window_that_is_not_finite_is_named_on_all_ranks(ranks, folder):
    message = "rank 1: perplexity: the model's output for window 2 holds NaN or Inf"
    answers = ranks.run(2, CASE, folder, torch.zeros(64, dtype=torch.int64), 16, False, (1,))
    assert [answer[:2] for answer in answers] == [("ValueError", message)] * 2


def test_bad_arguments_are_refused_alike(ranks, folder):
    answers = ranks.run(2, CASE, folder, torch.zeros(8, dtype=torch.int64), 16, False)
    assert [answer[0] for answer in answers] == ["ValueError"] * 2
    assert answers[0][1] == answers[1][1] == "ids: one window of length 16 needs 16 tokens, got 8"


def test_ranks_with_other_windows_are_refused(ranks, folder):
    answers = ranks.run(2, CASE, folder, torch.zeros(64, dtype=torch.int64), 16, False, (), (1,))
    assert [answer[0] for answer in answers] == ["ValueError"] * 2
    assert answers[0][1] == answers[1][1]
    assert answers[0][1].startswith("ids: expected the same on all ranks, got another on rank 1")
