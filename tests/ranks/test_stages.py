"""Corrected and tuned runs of several ranks: the same bits as one process."""

from __future__ import annotations

import math

import pytest
import torch

import sparsekern
from sparsekern import BlockTuning, Distill
from tests.tiny import llama, save_folder

from .pool import succeeded
from .runs import digests, killed, pruned, tokens

RUNS = "tests.ranks.runs"
TUNE = BlockTuning(passes=2, batch_tokens=24, learning_rate=1e-3)
DISTILL = Distill(steps=3, batch_tokens=90, learning_rate=1e-3)
CORRECTED, TUNED = {"correction": "dense"}, {"tune": TUNE}
BOTH = CORRECTED | TUNED
ALLOCATED = {"pattern": 0.5, "allocation": "fisher"}


def figures(report: dict) -> tuple[list, list]:
    """What the report says of layers and blocks, without seconds."""
    return (
        [(layer["error"], layer["correction"]) for layer in report["layers"]],
        [row | {"seconds": 0} for row in report["results"]["tuning"]],
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparsegpt", CORRECTED),
        ("alps", CORRECTED),
        ("wanda", {"correction": "sequential"}),
        ("magnitude", CORRECTED),
        ("wanda", TUNED),
        ("sparsegpt", BOTH),
        ("wanda", ALLOCATED),
    ],
)
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, method, options):
    expected, alone = pruned(0, method, **options)
    assert (len({layer["zeros"] / math.prod(layer["shape"]) for layer in alone["layers"]}) > 1) == ("allocation" in options)
    for size in (2, 4):
        for digest, report in succeeded(ranks.run(size, f"{RUNS}:with_options", method, options)):
            assert digest == expected and figures(report) == figures(alone)


def test_distillation_has_the_same_bits_for_every_number_of_ranks(ranks):
    expected, alone = pruned(0, "wanda", distill=DISTILL, samples=16)
    curve = alone["results"]["distillation"]
    assert curve[-1]["kl"] < curve[0]["kl"]
    for size in (2, 4):
        for digest, report in succeeded(ranks.run(size, f"{RUNS}:with_options", "wanda", {"distill": DISTILL, "samples": 16})):
            assert digest == expected and report["results"]["distillation"] == curve


def test_a_killed_distillation_is_resumed_by_another_number_of_ranks(ranks, tmp_path):
    """Weights, moments and the curve are those of the first rank, which alone reads them."""
    expected, alone = pruned(0, "wanda", tmp_path / "whole", distill=DISTILL, samples=16)
    options = {"distill": DISTILL, "samples": 16, "out": tmp_path / "out"}
    assert set(ranks.run(4, f"{RUNS}:killed_in_distillation", "wanda", options)) == {"killed"}
    for digest, report in succeeded(ranks.run(2, f"{RUNS}:with_options", "wanda", options | {"resume": True})):
        assert digest == expected and report["results"]["distillation"] == alone["results"]["distillation"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_rank_without_batches_takes_part(ranks):
    expected, _ = pruned(0, "wanda", samples=3, **BOTH)
    answers = succeeded(ranks.run(4, f"{RUNS}:warned", "wanda", 3, BOTH))
    assert [digest for digest, _ in answers] == [expected] * 4


def test_a_killed_run_is_resumed_by_another_number_of_ranks(ranks, tmp_path):
    expected, alone = pruned(0, "wanda", tmp_path / "whole", **BOTH)
    options = BOTH | {"out": tmp_path / "out"}
    assert set(ranks.run(4, f"{RUNS}:killed_with_options", "wanda", options)) == {"killed"}
    for digest, report in succeeded(ranks.run(2, f"{RUNS}:with_options", "wanda", options | {"resume": True})):
        assert digest == expected and figures(report) == figures(alone) and report["run"]["resumed_blocks"] == 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_streamed_model_gives_the_same_files_also_after_a_kill(ranks, tmp_path):
    options = BOTH | ALLOCATED | {"source": save_folder(tmp_path / "model", num_hidden_layers=2)}
    pruned(0, "wanda", tmp_path / "whole", **options)
    killed(0, 1, "wanda", tmp_path / "out", **options)
    succeeded(ranks.run(2, f"{RUNS}:with_options", "wanda", options | {"out": tmp_path / "out", "resume": True}))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_leaves_only_change_the_order_of_sums():
    """With all batches in each step, the gradient is the same sum."""
    found = []
    for leaves in (1, 4):
        model = llama(num_hidden_layers=2)
        tune = BlockTuning(passes=3, batch_tokens=10**6, learning_rate=1e-3)
        report = sparsekern.prune(model, "wanda", "2:4", tokens(12), batch_size=1, leaves=leaves, tune=tune, progress=False)
        assert all(row["after"] < row["before"] and row["steps"] == 3 for row in report.tuning)
        found.append((model, [row["after"] for row in report.tuning]))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=0)
    for one, other in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
