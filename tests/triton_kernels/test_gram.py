from __future__ import annotations

import pytest
import torch

from sparsekern.ops.gram import reference
from sparsekern.triton_kernels.gram import gram_


def check(x: torch.Tensor, **options) -> None:
    gram = torch.randn(x.shape[1], x.shape[1])
    expected = gram.clone()
    gram_(gram, x, **options)
    reference(expected, x, **options)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=2e-5 * len(x) ** 0.5 + 1e-6)
    assert torch.equal(gram.triu(1), expected.triu(1))


@pytest.mark.parametrize("features", [264, 261])  # rows that the copy engine can read, and that it cannot
@pytest.mark.parametrize(
    ("dtype", "masked"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_whole_waves_chains_of_tokens_and_splits(few_multiprocessors, features, dtype, masked):
    x = torch.randn(200, features).to(dtype)
    check(x, row_mask=torch.arange(200) % 5 > 0 if masked else None, alpha=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_parts_of_larger_ones(dtype):
    large = torch.randn(50, 300).to(dtype)
    check(large[:, 8:72])  # aligned for the copy engine
    check(large[:, 3:67])
    check(large[::2, 16:80])
    check(large[:1].expand(40, 300)[:, :64])
    check(large.T)


def test_a_result_with_any_strides():
    x = torch.randn(30, 40)
    expected = torch.zeros(40, 40)
    gram_(expected, x)
    for gram in (torch.zeros(40, 40).T, torch.zeros(40, 100)[:, :40], torch.zeros(80, 80)[::2, ::2]):
        gram_(gram, x)
        assert torch.equal(gram, expected)


def test_what_masked_rows_hold_does_not_matter():
    x = torch.randn(70, 40)
    expected, gram = torch.zeros(40, 40), torch.zeros(40, 40)
    row_mask = torch.arange(70) % 2 > 0
    gram_(expected, x[row_mask])
    x[~row_mask] = float("nan")
    gram_(gram, x, row_mask=row_mask)
    torch.testing.assert_close(gram, expected)


def test_the_same_bits_on_every_run(few_multiprocessors):
    x = torch.randn(300, 264).bfloat16()
    first, second = torch.zeros(264, 264), torch.zeros(264, 264)
    gram_(first, x)
    gram_(second, x)
    assert torch.equal(first, second)


def tf32(x: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    """float32 with ten bits of fraction: rounded half away as cvt.rna does, or cut off as the tensor cores read it."""
    bits = x.view(torch.int32) + (1 << 12 if rounded else 0)
    return (bits & ~0x1FFF).view(torch.float32)


def test_three_products_of_tf32_pieces_have_the_error_of_float32():
    """The decomposition of "tf32x3", which the interpreter does not follow, product by product."""
    x = torch.randn(2000, 40) * torch.logspace(-3, 3, 40)
    large = tf32(x, rounded=True)
    small = tf32(x - large, rounded=False)
    exact = x.double().T @ x.double()
    scale = x.double().abs().T @ x.double().abs()
    products = small.double().T @ large.double() + large.double().T @ small.double() + large.double().T @ large.double()
    float32 = ((x.T @ x).double() - exact).abs() / scale
    assert ((products - exact).abs() / scale).max() <= float32.max()
    one_product = (large.double().T @ large.double() - exact).abs() / scale
    assert one_product.max() > 100 * float32.max()  # what would pass for a solution, and is none


@pytest.mark.parametrize(
    ("gram", "x", "row_mask", "message"),
    [
        (torch.zeros(3, 3), torch.zeros(2, 4), None, r"x: expected shape \(2, 3\) of .*float32.* on .*, got \(2, 4\)"),
        (torch.zeros(3, 4), torch.zeros(2, 3), None, r"x: expected shape \(2, 4\)"),
        (torch.zeros(3, 3), torch.zeros(2, 3).double(), None, "x: .* got .* of torch.float64"),
        (torch.zeros(3, 3), torch.zeros(2, 3), torch.ones(3) > 0, r"row_mask: expected shape \(2,\) of torch.bool"),
    ],
)
def test_a_direct_call_does_not_leave_its_memory(gram, x, row_mask, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.sparsekern.gram_(gram, x, row_mask=row_mask)
