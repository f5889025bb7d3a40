from __future__ import annotations

import math

import pytest
import torch

from sparsekern.ops import linear_kl
from sparsekern.ops.linear_kl import reference

from .strategies import INTERPRETED


def problem(generator, tokens, words, features, wide, dtype=torch.float32, scale=1.0):
    x, head, teacher_x, teacher_head = (
        (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
        for rows, columns in ((tokens, features), (words, features), (tokens, wide), (words, wide))
    )
    return x, head, teacher_x, teacher_head


def exact(x, head, teacher_x, teacher_head, temperature=1.0):
    """Divergence and gradient in float64: a plain sum over the words, and autograd."""
    x, head, teacher_x, teacher_head = (value.double() for value in (x, head, teacher_x, teacher_head))
    x.requires_grad_()
    student = torch.log_softmax(x @ head.T / temperature, 1)
    teacher = torch.log_softmax(teacher_x @ teacher_head.T / temperature, 1)
    kl = (teacher.exp() * (teacher - student)).sum(1)
    (grad,) = torch.autograd.grad(kl.sum(), x)
    return kl.detach(), grad


@pytest.mark.parametrize(
    ("tokens", "words", "features", "wide"),
    [(1, 1, 1, 1), (3, 5, 2, 7), (16, 64, 16, 16), (17, 65, 33, 20), (50, 700, 48, 48), (5, 1030, 530, 12)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_divergence_and_its_gradient(isa, generator, tokens, words, features, wide, dtype):
    given = problem(generator, tokens, words, features, wide, dtype, 0.4)
    kl, grad = linear_kl(*given)
    expected_kl, expected_grad = exact(*given)
    assert kl.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected_kl, rtol=2e-5, atol=2e-6)
    tolerance = (
        2e-5 if dtype == torch.float32 or not INTERPRETED else 2e-2
    )  # a device rounds the logits' gradient to the head's dtype
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=tolerance, atol=tolerance * float(expected_grad.abs().max() + 0.1)
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(isa, generator, temperature):
    given = problem(generator, 9, 40, 12, 12)
    kl, grad = linear_kl(*given, temperature)
    expected_kl, expected_grad = exact(*given, temperature)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2e-5, atol=1e-5)


def test_equal_sides_have_no_divergence(isa, generator):
    x, head, *_ = problem(generator, 20, 90, 24, 24)
    kl, grad = linear_kl(x, head, x.clone(), head)
    assert kl.abs().max() < 1e-6 and grad.abs().max() < 1e-5


def test_large_logits_keep_their_accuracy(isa, generator):
    """Exponentials of hundreds: only differences to the largest logit may be taken."""
    given = problem(generator, 6, 200, 40, 40, scale=5.0)
    kl, grad = linear_kl(*given)
    expected_kl, expected_grad = exact(*given)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-3)


def test_tokens_do_not_depend_on_their_neighbours(isa, generator):
    x, head, teacher_x, _ = problem(generator, 400, 33, 5, 5)  # more tokens than are taken at once
    kl, grad = linear_kl(x, head, teacher_x, head)
    alone = [linear_kl(x[i : i + 1], head, teacher_x[i : i + 1], head) for i in (0, 15, 16, 383, 384, 399)]
    for i, (one, its_grad) in zip((0, 15, 16, 383, 384, 399), alone, strict=True):
        torch.testing.assert_close(kl[i], one[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[i], its_grad[0], rtol=1e-5, atol=1e-5)


def test_no_token(isa):
    kl, grad = linear_kl(torch.zeros(0, 4), torch.ones(3, 4), torch.zeros(0, 5), torch.ones(3, 5))
    assert kl.shape == (0,) and grad.shape == (0, 4)


@pytest.mark.parametrize("function", [linear_kl, reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_values_that_are_not_finite_are_named(isa, generator, function, bad, place):
    given = problem(generator, 20, 30, 8, 8)
    given[place][13, 3] = bad
    name = ("x", "head", "teacher_x", "teacher_head")[place]
    with pytest.raises(ValueError, match=rf"{name}: expected finite values, got {bad} at \[13, 3\]"):
        function(*given)


@pytest.mark.parametrize("function", [linear_kl, reference])
def test_logits_that_overflow_are_refused(isa, function):
    big = torch.full((2, 2), 1e30)
    with pytest.raises(ValueError, match="x, teacher_x: expected logits that float32 can hold, got an overflow"):
        function(big, big, big, big)


F, H = torch.zeros(2, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((F[0], H, F, H), ValueError, r"x: expected 2 dimensions, got shape \(8,\)"),
        ((F, H.half(), F, H), TypeError, "head: expected dtype float32, got float16"),
        ((F, H[:, :5], F, H), ValueError, r"head: expected shape \('any', 8\), got \(3, 5\)"),
        ((F, H, F[:1], H), ValueError, r"teacher_x: expected shape \(2, 'any'\), got \(1, 8\)"),
        ((F, H, F, H[:2]), ValueError, r"teacher_head: expected shape \(3, 8\), got \(2, 8\)"),
        ((F, H[:0], F, H), ValueError, r"head: expected at least one word and one feature, got shape \(0, 8\)"),
        ((F, H, F, H, 0.0), ValueError, "temperature: expected a number above 0, got 0.0"),
        ((F, H, F, H, math.inf), ValueError, "temperature: expected a finite number, got inf"),
        ((F, H, F, H, True), TypeError, "temperature: expected a number, got True"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_kl(*arguments)
