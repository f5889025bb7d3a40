"""The model on paper of one token on a GPU: its page is that of the code, and its counts are those of the layouts."""

from __future__ import annotations

import pytest
import torch

from bench.decoding import H200, PAGE, bitmask, conflicts, dense, longest, one_of_four, page, streams, two_of_four
from sparsekern.runtime.formats import format_of


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m bench.decoding writes it"


def test_bytes_are_those_of_the_formats():
    rows, columns = 64, 1024
    found = (
        (bitmask(rows, columns, 0.5), "bitmask", 2),
        (two_of_four(rows, columns), "2:4", 2),
        (one_of_four(rows, columns), "1:4", 4),
    )
    for estimate, name, every in found:
        weight = torch.ones(rows, columns, dtype=torch.bfloat16) * (torch.arange(columns) % every == 0)
        assert estimate.memory * H200.bytes_a_second == pytest.approx(format_of(name).packed_bytes(weight), rel=0.02)
    assert dense(rows, columns).memory * H200.bytes_a_second == pytest.approx(weight.nbytes)


def test_lanes_that_meet_in_a_bank_wait():
    assert conflicts(0.0, 10) == 0 and conflicts(1 / 32) < 1.5
    assert 2 < conflicts(0.5) < 3 < conflicts(1.0) < 4  # one ball for each of 32 boxes: 3.5 in the fullest


def test_streams_are_as_long_as_the_longest():
    assert longest(256, 0.0, 64, 1) == 0 and longest(256, 1.0, 64, 1) == 256
    assert 126 < longest(256, 0.5, 1) < 130 and 144 < longest(256, 0.5, 64) < 150  # 2.4 standard deviations of 8 above 128
    assert 1.1 < streams(4096, 4096, 0.5).memory / bitmask(4096, 4096, 0.5).memory < 1.2
