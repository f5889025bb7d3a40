"""Products with packed experts have the gradients of the dense products."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ops

from .experts import choice
from .test_bitmask_experts_linear import packed_of as bitmask_of
from .test_nm_experts_linear import experts_of
from .test_nm_experts_linear import packed_of as nm_of

COUNT, ROWS, COLUMNS = 3, 19, 40


def problem(kind: str, dtype: torch.dtype = torch.float32):
    """Return a weight and a function that multiplies by it, packed."""
    weight = experts_of(COUNT, ROWS, COLUMNS, 2, 4, dtype, torch.Generator().manual_seed(0))
    if kind == "bitmask":
        packed = bitmask_of(weight)
        return weight, packed, lambda x, experts, bias=None: ops.bitmask_experts_linear(x, experts, *packed, bias)
    packed = nm_of(weight, 2, 4)
    return weight, packed, lambda x, experts, bias=None: ops.nm_experts_linear(x, experts, *packed, 2, 4, bias)


def dense(weight: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = (weight[experts] @ x[:, None, :, None]).squeeze(-1)
    return y if bias is None else y + bias[experts]


KINDS = pytest.mark.parametrize("kind", ["bitmask", "2:4"])


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "choices"), [(1, 2), (40, 3), (0, 2)])
def test_gradients_of_the_dense_products(kind, dtype, tokens, choices):
    weight, _, product = problem(kind, dtype)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(tokens, COLUMNS, generator=generator), torch.randn(COUNT, ROWS, generator=generator)
    experts = choice(COUNT, tokens, choices, generator)
    factor = torch.randn(tokens, choices, ROWS, generator=generator)
    found = [tensor.to(dtype).clone().requires_grad_() for tensor in (x, bias)]
    (product(found[0], experts, found[1]) * factor).sum().backward()
    expected = [tensor.double().requires_grad_() for tensor in (x.to(dtype), bias.to(dtype))]
    (dense(weight.double(), expected[0], experts, expected[1]) * factor.to(dtype).double()).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for got, want in zip(found, expected, strict=True):
        largest = float(want.grad.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=tolerance * largest)


@KINDS
def test_second_gradients(kind):
    weight, _, product = problem(kind)
    experts = torch.tensor([[0, 2], [1, 2]])
    x, found = torch.randn(2, COLUMNS), []
    for run in (product, lambda x, experts: dense(weight, x, experts)):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(given, experts).square().sum(), given, create_graph=True)
        grad.square().sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


@KINDS
def test_a_compiled_graph_has_no_gradients_and_says_so(kind):
    _, _, product = problem(kind)
    experts = torch.tensor([[0, 2], [1, 2]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: product(x, experts).square().sum(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(2, COLUMNS))
    with pytest.raises(Exception, match="a product with packed experts has no gradient in a compiled graph"):
        compiled(torch.randn(2, COLUMNS, requires_grad=True))


@KINDS
def test_packed_values_have_no_gradient(kind):
    _, packed, product = problem(kind)
    packed[0].requires_grad_(True)
    with pytest.raises(ValueError, match="^values: expected a tensor that requires no gradient, since .*_linear has no gradient"):
        product(torch.randn(2, COLUMNS), torch.tensor([[0], [1]]))


@KINDS
@pytest.mark.parametrize("place", [0, None])
def test_tensors_that_change_before_backward_are_refused(kind, place):
    _, packed, product = problem(kind)
    experts = torch.tensor([[0], [1]])
    y = product(torch.randn(2, COLUMNS, requires_grad=True), experts).sum()
    (experts if place is None else packed[place]).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
