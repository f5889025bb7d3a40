"""The pieces of float32 products."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekern.triton_kernels.pieces import split_in_three


def assert_pieces(x: torch.Tensor) -> None:
    for dim in (-1, -2):
        falling, rising = (split_in_three(x, dim, rising=rising) for rising in (False, True))
        assert falling.dtype == torch.bfloat16
        high, middle, low = (
            falling.double().chunk(3, dim) if x.numel() else [falling.double()[..., : x.shape[-2], : x.shape[-1]]] * 3
        )
        assert torch.equal(high + middle + low, x.double())
        assert (middle.abs() <= 2.0**-8 * high.abs()).all() and (low.abs() <= 2.0**-16 * high.abs()).all()
        assert x.numel() == 0 or all(map(torch.equal, rising.chunk(3, dim), falling.chunk(3, dim)[::-1]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1030), (2, 3, 40), (0, 5), (5, 0)])
def test_three_matrices_of_bfloat16_make_the_whole(generator, poisoned, shape):
    assert_pieces(torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-20, 20, shape, generator=generator))


def test_views_and_what_is_transposed(generator, poisoned):
    whole = torch.randn(6, 50, generator=generator)
    for x in (whole[:, 3:9], whole[1:4, 7:8], whole.T, whole[2:, 4:30].T, whole[:, ::2]):
        assert_pieces(x)
    assert split_in_three(whole.T, -1).stride() == (1, 50) and split_in_three(whole.T, -2).stride() == (1, 150)  # cuBLAS reads both


def test_what_is_not_finite_stays_so():
    of_a_gpu = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # every bit of its NaN is set
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, 0.0, -0.0, 0.0]])
    x[0, -1] = of_a_gpu
    assert split_in_three(x, -2).float().sum(0).isfinite().tolist() == [False] * 3 + [True] * 3 + [False]


def test_float32_only():
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 3\) of torch.float32"):
        split_in_three(torch.zeros(2, 3).double(), -1)
