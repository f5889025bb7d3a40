from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.nm_q4 import COLUMNS, PATTERNS, Q4Layout
from sparsekern.ops import nm_q4_linear, nm_q4_pack, nm_q4_unpack
from sparsekern.ops.nm_linear import sparse_weight
from sparsekern.ops.nm_q4_linear import random_scales

from .strategies import FLOATS

ALL_PATTERNS = pytest.mark.parametrize("n, m", PATTERNS)


def packed_weight(rows: int, columns: int, n: int, m: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that 4 bits hold exactly, and its blocks."""
    weight = sparse_weight(rows, columns, n, m, torch.float32, generator)
    blocks = nm_q4_pack(weight, random_scales(rows, columns, generator), n, m)
    return nm_q4_unpack(blocks, n, m, rows, columns)[0], blocks


def rounded_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Each 64 columns by themselves, in float64 but for the scale and the quotient, whose rounding is part of the contract."""
    rounded = x.double().clone()
    for first in range(0, x.shape[-1], COLUMNS):
        part = x[..., first : first + COLUMNS].float()
        scale = part.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(part / scale.where(scale > 0, 1)).clamp(-127, 127)
        rounded[..., first : first + COLUMNS] = codes.double() * scale.double()
    return rounded


def assert_close_to(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """As near to the exact product of the rounded activations as sums in float32 and the rounding of the result allow."""
    exact = x @ weight.double().T + (0 if bias is None else bias.double())
    size = x.abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    rounding = torch.finfo(y.dtype).eps
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", FLOATS)
@ALL_PATTERNS
def test_equals_the_product_with_rounded_activations(isa, poisoned, generator, n, m, dtype):
    for rows, columns in ((1, 16), (19, 208), (48, 448)):
        weight, blocks = packed_weight(rows, columns, n, m, generator)
        bias = torch.randn(rows, generator=generator).to(dtype)
        for tokens in (0, 1, 2, 3, 7, 16, 17, 40):
            x = (torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator) ** 4 * 50).to(dtype)
            assert_close_to(nm_q4_linear(x, blocks, n, m, rows), rounded_to_8_bits(x), weight)
            assert_close_to(nm_q4_linear(x, blocks, n, m, rows, bias), rounded_to_8_bits(x), weight, bias)


@ALL_PATTERNS
def test_rounding_the_activations_moves_no_result_further_than_half_a_step(isa, generator, n, m):
    weight, blocks = packed_weight(24, 320, n, m, generator)
    for tokens in (3, 20):
        x = torch.randn(tokens, 320, generator=generator)
        half_steps = x.view(tokens, 5, COLUMNS).abs().amax(-1).double() / 254
        bound = half_steps @ weight.view(24, 5, COLUMNS).double().abs().sum(-1).T
        error = (nm_q4_linear(x, blocks, n, m, 24).double() - x.double() @ weight.double().T).abs()
        assert (error <= bound * (1 + 1e-5)).all() and error.max() > 0.02 * bound.max()


@ALL_PATTERNS
def test_the_largest_sums_fit(isa, n, m):
    """Every activation and every value is at its limit, so that a sum of 16 bits would show."""
    layout = Q4Layout(n, m)
    kept = torch.arange(128) % m < n
    for code, sign in ((-8.0, 1.0), (7.0, 1.0), (-8.0, -1.0), (7.0, -1.0)):
        weight = torch.where(kept, code, 0.0).expand(layout.rows, -1).contiguous()
        blocks = nm_q4_pack(weight, torch.ones(layout.rows, 2).half(), n, m)
        for tokens in (1, 2, 4):
            y = nm_q4_linear(torch.full((tokens, 128), 127 * sign), blocks, n, m, layout.rows)
            assert (y == code * sign * 127 * int(kept.sum())).all()


@ALL_PATTERNS
def test_the_number_of_tokens_changes_no_token(isa, generator, n, m):
    _, blocks = packed_weight(40, 384, n, m, generator)
    x = torch.randn(40, 384, generator=generator)
    together = nm_q4_linear(x, blocks, n, m, 40)
    for first, tokens in ((0, 1), (5, 2), (11, 16)):
        some = nm_q4_linear(x[first : first + tokens], blocks, n, m, 40)
        torch.testing.assert_close(some, together[first : first + tokens], rtol=1e-5, atol=1e-5 * float(together.abs().max()))
    if isa == "reference":
        return  # PyTorch promises no equal bits
    assert torch.equal(nm_q4_linear(x[:7], blocks, n, m, 40)[6], nm_q4_linear(x[6:7], blocks, n, m, 40)[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_with_nan_or_inf_is_nan_and_no_other(isa, generator, dtype):
    _, blocks = packed_weight(24, 136, 2, 4, generator)
    for tokens in (2, 20):
        for value in (math.nan, math.inf, -math.inf):
            x = torch.randn(tokens, 136, generator=generator).to(dtype)
            x[1, 130] = value
            y = nm_q4_linear(x, blocks, 2, 4, 24)
            assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_very_small_and_very_large_activations(isa, generator):
    weight, blocks = packed_weight(8, 64, 2, 4, generator)
    x = torch.randn(1, 64, generator=generator).clamp(-3, 3)
    for size in (1e-44, 1e-38, 1e30):
        y = nm_q4_linear(x * size, blocks, 2, 4, 8)
        exact = (x * size).double() @ weight.double().T
        assert (y.double() - exact).abs().max() <= max(0.02 * float(exact.abs().max()), 64 * 8 * 2.0**-149)
    assert (nm_q4_linear(torch.zeros(3, 64), blocks, 2, 4, 8) == 0).all()


@ALL_PATTERNS
def test_no_blocks_lead_the_kernel_out_of_x(isa, generator, n, m):
    """Whatever comes of it, with the sanitized build in particular it is no read of other memory."""
    shape = Q4Layout(n, m).shape(21, 208)
    for tokens in (1, 2, 4, 20):
        x = torch.randn(tokens, 208, generator=generator)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        assert nm_q4_linear(x, blocks, n, m, 21).shape == (tokens, 21)
        assert nm_q4_linear(x, torch.full_like(blocks, 255), n, m, 21).shape == (tokens, 21)


def test_sizes_of_zero_and_leading_dimensions(isa, generator):
    for shape, rows in (((3, 0), 4), ((0, 8), 2), ((2, 8), 0), ((8,), 3), ((2, 0, 8), 3), ((2, 3, 8), 3)):
        weight, blocks = packed_weight(rows, shape[-1], 2, 4, generator)
        x = torch.randint(-127, 128, shape, generator=generator).float()
        x[..., :1] = 127  # so that 8 bits hold it exactly
        torch.testing.assert_close(nm_q4_linear(x, blocks, 2, 4, rows), torch.nn.functional.linear(x, weight))


def test_more_tokens_than_memory_where_there_is_nothing_to_multiply(isa):
    """The wrapper refuses such a shape; a direct call must not crash."""
    blocks = torch.empty(0, 0, 208, dtype=torch.uint8)
    assert torch.ops.sparsekern.nm_q4_linear(torch.empty(2**58, 0), blocks, 2, 4, 0).shape == (2**58, 0)


def test_the_gradient_is_that_of_the_product_without_rounding(generator):
    weight, blocks = packed_weight(19, 136, 2, 4, generator)
    for tokens in (2, 20):
        x = torch.randn(tokens, 136, generator=generator, requires_grad=True)
        bias = torch.randn(19, generator=generator, requires_grad=True)
        up = torch.randn(tokens, 19, generator=generator)
        (nm_q4_linear(x, blocks, 2, 4, 19, bias) * up).sum().backward()
        torch.testing.assert_close(x.grad, up @ weight)
        torch.testing.assert_close(bias.grad, up.sum(0))


def test_arguments_are_refused():
    blocks = torch.zeros(2, 3, 208, dtype=torch.uint8)
    sound = {"x": torch.zeros(2, 136), "blocks": blocks, "n": 2, "m": 4, "out_features": 16}
    nm_q4_linear(**sound)
    for changed, message in (
        ({"x": torch.tensor(1.0)}, r"x: expected \[..., in_features\], got \(\)"),
        ({"x": torch.zeros(2, 134)}, "x: expected features divisible by m = 4, got 134"),
        ({"x": torch.zeros(2, 136).double()}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": torch.zeros(2, 64)}, r"blocks: expected shape \(2, 1, 208\), got \(2, 3, 208\)"),
        ({"out_features": 17}, r"blocks: expected shape \(3, 3, 208\), got \(2, 3, 208\)"),
        ({"out_features": -1}, "out_features: expected at least 0, got -1"),
        ({"out_features": 16.0}, "out_features: expected a whole number, got 16.0"),
        ({"blocks": blocks.char()}, "blocks: expected dtype uint8, got int8"),
        ({"n": 5, "m": 16}, "n, m: expected 2:4, 1:4 or 4:16, which have a layout with 4-bit values, got 5:16"),
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"bias": torch.zeros(15)}, r"bias: expected shape \(16,\), got \(15,\)"),
        ({"bias": torch.zeros(16).half()}, "bias: expected dtype float32, got float16"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_q4_linear(**(sound | changed))
