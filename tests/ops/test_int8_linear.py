from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.int8_rows import check_int8, quantize_rows, restore_rows
from sparsekern.ops import int8_linear

from .strategies import FLOATS


def random_weight(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return values, torch.rand(rows, generator=generator) + 0.01


@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_the_float64_product(isa, poisoned, generator, dtype):
    for rows, columns in ((1, 3), (50, 77)):
        values, scales = random_weight(rows, columns, generator)
        weight = values.double() * scales.double()[:, None]
        bias = torch.randn(rows, generator=generator).to(dtype)
        for tokens, added in ((0, bias), (1, None), (1, bias), (2, None), (3, bias), (7, None), (17, bias), (40, None), (40, bias)):
            x = (torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator) ** 4).to(dtype)
            y = int8_linear(x, values, scales, added)
            exact = x.double() @ weight.T + (0 if added is None else added.double())
            size = x.double().abs() @ weight.abs().T + exact.abs()
            assert y.dtype == dtype and y.shape == exact.shape
            assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * size).all()


def test_no_sum_of_float16_overflows_before_its_scale(isa):
    """127 * 127 * 64 columns are beyond float16."""
    x = torch.full((1, 64), 127.0, dtype=torch.float16)
    for tokens in (1, 20):
        y = int8_linear(x.expand(tokens, -1), torch.full((3, 64), 127, dtype=torch.int8), torch.full((3,), 2.0**-10))
        assert (y == torch.tensor(127 * 127 * 64 / 1024).half()).all()


def test_the_number_of_tokens_changes_no_token(isa, generator):
    values, scales = random_weight(40, 130, generator)
    x = torch.randn(40, 130, generator=generator)
    together = int8_linear(x, values, scales)
    for first, tokens in ((0, 1), (5, 2), (11, 16)):
        some = int8_linear(x[first : first + tokens], values, scales)
        torch.testing.assert_close(some, together[first : first + tokens], rtol=1e-5, atol=1e-5 * float(together.abs().max()))


def test_nan_and_inf_stay_in_their_token(isa, generator):
    values, scales = random_weight(20, 70, generator)
    values[:, 66] = 5
    for tokens in (2, 40):
        for value in (math.nan, math.inf):
            x = torch.randn(tokens, 70, generator=generator)
            x[1, 66] = value
            y = int8_linear(x, values, scales)
            assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_sizes_of_zero_leading_dimensions_and_strides(isa, generator):
    for shape, rows in (((3, 0), 4), ((0, 8), 2), ((2, 8), 0), ((8,), 3), ((2, 0, 8), 3), ((2, 3, 8), 17)):
        values, scales = random_weight(rows, shape[-1], generator)
        x = torch.randn(shape, generator=generator)
        expected = torch.nn.functional.linear(x, restore_rows(values, scales))
        torch.testing.assert_close(int8_linear(x, values, scales), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(int8_linear(x, values.T.contiguous().T, scales), expected, rtol=1e-5, atol=1e-4)


def test_the_gradient_is_that_of_the_product(generator):
    values, scales = random_weight(19, 36, generator)
    x = torch.randn(2, 36, generator=generator, requires_grad=True)
    bias = torch.randn(19, generator=generator, requires_grad=True)
    up = torch.randn(2, 19, generator=generator)
    (int8_linear(x, values, scales, bias) * up).sum().backward()
    torch.testing.assert_close(x.grad, up @ restore_rows(values, scales))
    torch.testing.assert_close(bias.grad, up.sum(0))


def test_arguments_are_refused():
    sound = {"x": torch.zeros(2, 9), "values": torch.zeros(4, 9, dtype=torch.int8), "scales": torch.ones(4)}
    int8_linear(**sound)
    for changed, message in (
        ({"x": torch.tensor(1.0)}, r"x: expected \[..., in_features\], got \(\)"),
        ({"x": torch.zeros(2, 8)}, "x: expected 9 features, the columns of values, got 8"),
        ({"x": torch.zeros(2, 9).double()}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"values": torch.zeros(4, 9)}, "values: expected dtype int8, got float32"),
        ({"scales": torch.ones(5)}, r"scales: expected shape \(4,\), got \(5,\)"),
        ({"scales": torch.ones(4).half()}, "scales: expected dtype float32, got float16"),
        ({"bias": torch.zeros(5)}, r"bias: expected shape \(4,\), got \(5,\)"),
        ({"bias": torch.zeros(4).half()}, "bias: expected dtype float32, got float16"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            int8_linear(**(sound | changed))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_is_rounded_by_at_most_half_a_step(generator, dtype):
    """The step is the row's largest magnitude by 127, with a scale of 11 bits."""
    weight = (torch.randn(37, 50, generator=generator) * torch.logspace(-9, 4, 37)[:, None]).to(dtype)
    weight[5] = 0
    values, scales = quantize_rows(weight)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    error = (values.double() * scales.double()[:, None] - weight.double()).abs()
    assert (error <= step * (0.5 + 127 * 2.0**-11)).all() and values.abs().max() == 127
    assert (values[5] == 0).all() and scales[5] == 0
    check_int8(values, scales)
    normal = scales >= 2.0**-14
    assert torch.equal(scales[normal], scales[normal].half().float()) and 0 < int(normal.sum()) < 36


def test_weights_of_any_number_of_rows_are_rounded_alike(generator):
    weight = torch.randn(2050, 3, generator=generator)
    values, scales = quantize_rows(weight)
    for row in (0, 1023, 1024, 2049):
        own_values, own_scales = quantize_rows(weight[row : row + 1])
        assert torch.equal(own_values[0], values[row]) and own_scales[0] == scales[row]
    assert quantize_rows(weight[:0])[0].shape == (0, 3) and quantize_rows(weight[:2, :0])[1].tolist() == [0, 0]


def test_what_is_not_finite_is_refused():
    weight = torch.ones(1030, 4)
    for value in (math.nan, math.inf, -math.inf):
        weight[1028, 2] = value
        with pytest.raises(ValueError, match="^weight: expected finite values, got (nan|inf) in row 1028$"):
            quantize_rows(weight)


def test_unsound_tensors_are_named():
    values, scales = quantize_rows(torch.ones(3, 4))
    for scale, found in ((math.nan, "nan"), (math.inf, "inf"), (-1.0, "-1.0")):
        changed = scales.clone()
        changed[2] = scale
        with pytest.raises(ValueError, match=f"^scales: expected finite values of at least 0, got {found} in row 2$"):
            check_int8(values, changed)
    values[1, 3] = -128
    with pytest.raises(ValueError, match="^values: expected -127 to 127, got -128 in row 1$"):
        check_int8(values, scales)
