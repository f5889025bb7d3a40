"""Runs of several ranks: the same bits as one process."""

from __future__ import annotations

import re

import pytest

import sparsekern
from tests.tiny import llama, save_folder

from .pool import succeeded
from .runs import digests, killed, pruned, tokens

RUNS = "tests.ranks.runs"
RUN = f"{RUNS}:pruned"


@pytest.mark.parametrize(
    "method",
    [
        *("sparsegpt", "wanda", "copal", "magnitude"),
        sparsekern.SparseLLM(iterations=2),
        sparsekern.SparseLLM(iterations=2, attention="pruned", solver="wanda"),
    ],
    ids=str,
)
def test_the_result_has_the_same_bits_for_every_number_of_ranks(ranks, tmp_path, method):
    expected, alone = pruned(0, method, out=tmp_path / "1")
    for size in (2, 4):
        out = tmp_path / str(size)
        for digest, report in succeeded(ranks.run(size, RUN, method, out)):
            assert digest == expected
            assert [layer["error"] for layer in report["layers"]] == [layer["error"] for layer in alone["layers"]]
        assert digests(out) == digests(tmp_path / "1")


def test_networks_that_ranks_solve_are_those_of_one_sum():
    """But for rounding: without leaves, sums over tokens are taken one batch after another."""
    shared, whole = (pruned(0, sparsekern.SparseLLM(), leaves=leaves)[1] for leaves in (8, None))
    for layer, expected in zip(shared["layers"], whole["layers"], strict=True):
        assert layer["error"] == pytest.approx(expected["error"], rel=0.05)
        assert layer["output_error"] == (expected["output_error"] and pytest.approx(expected["output_error"], rel=0.05))


@pytest.mark.parametrize(
    ("method", "format"), [("wanda", "dense"), ("wanda", "packed"), ("sparsegpt", "dense"), ("sparsellm", "dense")]
)
def test_a_streamed_model_gives_the_same_files(ranks, tmp_path, method, format):
    source = save_folder(tmp_path / "source", num_hidden_layers=2)
    pruned(0, method, tmp_path / "1", source, format=format)
    for size in (2, 4):
        out = tmp_path / str(size)
        succeeded(ranks.run(size, RUN, method, out, source, 11, format))
        assert digests(out) == digests(tmp_path / "1")


@pytest.mark.parametrize("sizes", [(4, 2), (1, 4), (2, 1)])
def test_a_killed_run_is_resumed_by_another_number_of_ranks(ranks, tmp_path, sizes):
    expected, _ = pruned(0, "wanda", tmp_path / "whole")
    first, second = sizes
    assert set(ranks.run(first, f"{RUNS}:killed", 1, "wanda", tmp_path / "out")) == {"killed"}
    assert (tmp_path / "out/checkpoint/block-00000.safetensors").exists()
    for digest, report in succeeded(ranks.run(second, f"{RUNS}:resumed", "wanda", tmp_path / "out")):
        assert digest == expected
        assert report["run"]["resumed_blocks"] == 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_run_is_not_resumed_with_other_leaves(tmp_path):
    killed(0, 1, "wanda", tmp_path / "out")
    with pytest.raises(ValueError, match=r"belongs to a run with leaves=8; pass leaves=8 \(--leaves 8\) to continue it"):
        pruned(0, "wanda", tmp_path / "out", resume=True, leaves=None)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nan", "ValueError", "rank 3: model.layers.0.self_attn.q_proj: its input is nan in calibration sample 6"),
        ("method", "ArithmeticError", "rank 3: a bug of the user's"),
        ("endless", "ArithmeticError", "rank 3: a bug of the user's"),  # the others would work for ever
        ("seed", "ValueError", "seed: expected the same on all ranks, got another on rank 3 than on rank 0 (seed 1 and 0)"),
        ("data", "ValueError", "calibration: expected the same on all ranks, got another on rank 3 than on rank 0"),
        ("model", "ValueError", "model: expected the same on all ranks, got another on rank 3 than on rank 0"),
        ("pattern", "ValueError", "patterns: expected the same on all ranks, got another on rank 3 than on rank 0"),
        (
            "shares",
            "ValueError",
            "patterns: expected the same on all ranks, got another on rank 3 than on rank 0",
        ),  # in front of its sums
        ("version", "ValueError", "torch: expected the same on all ranks, got another on rank 3 than on rank 0"),
        ("argument", "ValueError", "rank 3: pattern:"),
    ],
)
def test_a_failure_on_one_rank_is_the_same_exception_on_all(ranks, kind, error, message):
    for name, text, unchanged in ranks.run(4, f"{RUNS}:failing", kind, None, 3):
        assert (name, unchanged) == (error, True)
        assert text.startswith(message)


def test_a_full_disk_ends_all_ranks_and_leaves_the_block_unchanged(ranks, tmp_path):
    for answer in ranks.run(4, f"{RUNS}:failing", "disk", tmp_path / "out", 0):
        assert answer == ("OSError", "[Errno 28] rank 0: no space left: 'file'", True)


def test_a_folder_that_a_rank_does_not_see_is_refused_before_any_work(ranks, tmp_path):
    """As on two machines that share no disk, or with a relative path in another folder."""
    source = save_folder(tmp_path / "source", num_hidden_layers=1)
    for name, text in ranks.run(2, f"{RUNS}:elsewhere", source, tmp_path):
        assert name == "ValueError" and text.startswith("rank 1: out: expected a folder that all ranks see, from which a streamed")
    assert not list(tmp_path.glob("*/out/**/*.safetensors"))


def test_two_runs_with_one_folder_refuse_each_other(ranks, tmp_path):
    from sparsekern.runtime.output import OutputFolder

    with OutputFolder.held(tmp_path / "out"):
        for name, text, _ in ranks.run(2, f"{RUNS}:failing", "none", tmp_path / "out", 0):
            assert name == "ValueError"
            assert "is in use by another process or call" in text


def test_more_ranks_than_batches_are_said(ranks):
    expected, _ = pruned(0, "wanda", samples=3)
    answers = ranks.run(4, f"{RUNS}:warned", "wanda", 3)
    assert [digest for digest, _ in answers] == [expected] * 4
    message = "3 calibration batches for 4 ranks, so that some ranks run none; a smaller batch_size (--batch-size) makes more"
    assert [texts.count(message) for _, texts in answers] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (2, {"method": "gradual"}, "method: expected a single process, got 2 ranks; Gradual does not work block by block"),
        (2, {"method": "kprune"}, "method: expected a single process, got 2 ranks; KPrune does not work block by block"),
        (3, {}, "leaves: expected a power of two that the number of ranks divides, got 8 for 3 ranks; start 1, 2, 4 or 8"),
        (2, {"leaves": 1}, "leaves: expected a power of two that the number of ranks divides, got 1 for 2 ranks"),
    ],
)
def test_what_ranks_cannot_share_is_refused(ranks, size, options, message):
    for name, text in ranks.run(size, f"{RUNS}:refused", options):
        assert name == "ValueError"
        assert text.startswith(message)


@pytest.mark.parametrize("leaves", [0, 3, 2048, True, "8"])
def test_a_bad_number_of_leaves_is_refused(leaves):
    with pytest.raises((TypeError, ValueError), match="leaves: expected a power of two up to 1024, got"):
        sparsekern.prune(llama(num_hidden_layers=1), "wanda", calibration=tokens(2), leaves=leaves)


def test_leaves_are_for_methods_that_work_block_by_block():
    with pytest.raises(ValueError, match="leaves: expected None for Gradual, which does not work block by block, got 2"):
        sparsekern.prune(llama(num_hidden_layers=1), "gradual", calibration=tokens(2), leaves=2)


def test_reports_say_what_each_rank_did(ranks):
    for _, report in succeeded(ranks.run(2, RUN, "sparsegpt")):
        assert report["run"]["versions"]["ranks"] == 2
        assert "solve" in report["results"]["measured"]["rank 1"]
        assert "MB by the formula" in report["results"]["measured"]["rank 1"]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_send_what_the_formula_says(ranks, size):
    """Of a block with inputs of 256, 256, 256 and 512 features; factors are passed on where rows of others need them."""
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    triangles = sum(4 * width * (width + 1) // 2 for width in (256, 256, 256, 512))
    solved = sum(rows * (4 * features + 16) for rows, features in shapes)
    least = 2 * (size - 1) * triangles + solved
    sent = formula = 0.0
    for line in succeeded(ranks.run(size, f"{RUNS}:traffic"))[0]:
        found = re.search(r"([\d.]+) MB sent a block, ([\d.]+) MB by the formula", line)
        own = [1e6 * float(text) for text in found.groups()]
        assert own[0] <= 1.2 * own[1]
        sent, formula = sent + own[0], formula + own[1]
    assert least - 1e4 <= formula <= least + triangles + 1e4
    assert formula <= sent + 1e4
