from __future__ import annotations

import pytest
import torch

from sparsekern.triton_kernels.matmul import add_product


def check(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options) -> None:
    before = out.clone()
    add_product(out, a, b, **options)
    expected = before.double() + options.get("alpha", 1.0) * (a.double() @ b.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * max(a.shape[1], 1) ** 0.5)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1, 1), (5, 40, 3), (130, 128, 128), (140, 200, 132), (0, 4, 4), (4, 0, 4)]
)
def test_any_size(rows, depth, columns):
    check(torch.randn(rows, columns), torch.randn(rows, depth), torch.randn(depth, columns), alpha=-0.5)


@pytest.mark.parametrize("width", [140, 141])  # rows that the copy engine can read, and that it cannot
def test_parts_of_larger_matrices(few_multiprocessors, width):
    """As a sweep uses it: the product of all columns before a block."""
    delta, factor, out = torch.randn(300, width), torch.randn(width, width), torch.randn(300, width)
    beyond = out[:, 132:].clone()
    for begin in (4, 100, 104):
        check(out[:, begin:132], delta[:, :begin], factor[:begin, begin:132])
    assert torch.equal(out[:, 132:], beyond)


def test_other_strides():
    a, b = torch.randn(30, 50), torch.randn(50, 20)
    check(torch.randn(20, 30).T, a.T.contiguous().T, b.T.contiguous().T)
    check(torch.randn(60, 40)[::2, ::2], a.repeat_interleave(2, 1)[:, ::2], b)


def test_the_same_bits_on_every_run(few_multiprocessors):
    a, b = torch.randn(300, 200), torch.randn(200, 64)
    first, second = torch.zeros(300, 64), torch.zeros(300, 64)
    add_product(first, a, b)
    add_product(second, a, b)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("out", "a", "b", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(5, 5), r"a: expected shape \(3, 5\)"),
        (torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 6), r"b: expected shape \(4, 5\)"),
        (
            torch.zeros(3, 5),
            torch.zeros(3, 4),
            torch.zeros(4, 5).double(),
            "b: expected .* of torch.float32.* got .* of torch.float64",
        ),
        (torch.zeros(3, 5).double(), torch.zeros(3, 4), torch.zeros(4, 5), "out: expected .* of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(out, a, b, message):
    with pytest.raises(ValueError, match=message):
        add_product(out, a, b)
