"""The model on paper of runs of several processes: its page is that of the code, and its counts are those of a run."""

from __future__ import annotations

import pytest

from bench.scaling import DEEPSEEK, EPYC, H100, LLAMA_70B, PAGE, SMOLLM2, estimate, page, sent_by
from sparsekern.ranks.sums import bytes_of_sum


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m bench.scaling writes it"


def test_the_models_have_their_number_of_weights():
    assert LLAMA_70B.block_weights * 80 == pytest.approx(68.5e9, rel=0.01)
    assert DEEPSEEK.block_weights * 61 == pytest.approx(700e9, rel=0.01)  # 671 billion with three dense blocks
    assert SMOLLM2.block_weights * 30 == pytest.approx(106e6, rel=0.01)


@pytest.mark.parametrize("processes", [2, 4, 8, 64])
def test_a_process_sends_the_sums_of_the_formula_and_the_results(processes):
    triangles = sum(part.features**2 / 2 for part in LLAMA_70B.inputs)
    expected = bytes_of_sum(processes, triangles) + 4 * triangles + 2 * LLAMA_70B.block_weights
    assert sum(sent_by(LLAMA_70B, H100, processes, 1000)) == pytest.approx(expected)
    assert (sent_by(LLAMA_70B, H100, processes, 1000)[1] > 0) == (processes > 8)


def test_one_process_sends_nothing_and_more_are_faster():
    seconds = [estimate(SMOLLM2, EPYC, processes, 1000).block for processes in (1, 2)]
    assert estimate(SMOLLM2, EPYC, 1, 1000).sent == 0
    assert seconds[0] / 2 <= seconds[1] < seconds[0]
