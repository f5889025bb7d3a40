"""The pieces of float32 products."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekern.triton_kernels.pieces import split_in_two


def assert_pieces(x: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    for piece in (high, low):
        assert piece.shape == x.shape and not (piece.contiguous().view(torch.int32) & 0x1FFF).any()
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-22 * x.double().abs()).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1030), (2, 3, 40), (0, 5), (5, 0)])
def test_two_matrices_of_tf32_make_the_whole(generator, poisoned, shape):
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-20, 20, shape, generator=generator)
    assert_pieces(x, *split_in_two(x))


def test_views_and_what_is_transposed(generator, poisoned):
    whole = torch.randn(6, 50, generator=generator)
    for x in (whole[:, 3:9], whole[1:4, 7:8], whole.T, whole[2:, 4:30].T, whole[:, ::2]):
        assert_pieces(x, *split_in_two(x))
    assert split_in_two(whole.T)[0].stride() == whole.T.stride()  # cuBLAS reads it as it is


def test_what_is_not_finite_stays_so():
    of_a_gpu = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # every bit of its NaN is set
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, 0.0, -0.0, 0.0]])
    x[0, -1] = of_a_gpu
    high, low = split_in_two(x)
    assert (high + low).isfinite().tolist() == [[False] * 3 + [True] * 3 + [False]]


def test_float32_only():
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 3\) of torch.float32"):
        split_in_two(torch.zeros(2, 3).double())
