"""What the C++ products of a few tokens take, and what is left to Triton."""

from __future__ import annotations

import pytest
import torch

from sparsekern.backends import decode, implementations
from sparsekern.layouts.packed_rows import pack_bitmask_rows, pack_nm_rows
from sparsekern.ops import OPS


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(decode, "_is_built", lambda op: True)


def support_of(op: str, *arguments):
    (known,) = (known for known in implementations(op) if known.name == "cuda")
    return known.supports(*arguments)


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.only_on_cuda])
def test_every_implementation_supports_a_sample_of_its_op(op, generator):
    """Or the tests on a device would not run it."""
    samples = list(OPS[op].samples(generator))
    for known in implementations(op):
        assert any(known.supports(*sample.args, **sample.kwargs).ok for sample in samples), known.name


@pytest.mark.parametrize(
    ("tokens", "columns", "dtype", "pattern", "reason"),
    [
        (16, 256, torch.bfloat16, (2, 4), ""),
        (17, 256, torch.bfloat16, (2, 4), "x has more than 16 tokens"),
        (0, 256, torch.bfloat16, (2, 4), "or none"),
        (1, 256, torch.float32, (2, 4), "x is float32, not of 16 bits"),
        (1, 192, torch.float16, (2, 4), "x has 192 input features, not a multiple of 128"),
        (1, 256, torch.float16, (1, 4), "the pattern is 1:4, not 2:4"),
    ],
)
def test_what_2_4_supports(tokens, columns, dtype, pattern, reason):
    packed = pack_nm_rows(torch.zeros(4, columns, dtype=dtype), *pattern).values()
    found = support_of("nm_linear", torch.zeros(tokens, columns, dtype=dtype), *packed, *pattern)
    assert found.ok == (not reason) and reason in found.reason


def test_a_library_without_the_kernel(monkeypatch):
    monkeypatch.setattr(decode, "_is_built", lambda op: False)
    packed = pack_bitmask_rows(torch.zeros(4, 64).half()).values()
    assert "built from another version" in support_of("bitmask_linear", torch.zeros(1, 64).half(), *packed).reason


def test_tokens_are_contiguous_and_padded_with_zeros():
    x = torch.randn(2, 3, 70)
    padded = decode.as_tokens(x, 64)
    assert padded.shape == (6, 128) and torch.equal(padded[:, :70], x.view(6, 70)) and not padded[:, 70:].any()
    assert decode.as_tokens(x[0].T.contiguous().T, 70).is_contiguous()
