from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from baselines.dense_gemv import dense_gemv
from sparsekern.runtime.formats import Bitmask

SHAPES = pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)], ids=lambda shape: f"{shape[0]}x{shape[1]}")


def sparse_weight(shape: tuple[int, int], zeros: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(shape, generator=generator)
    return (weight * (torch.rand(shape, generator=generator) >= zeros)).to(dtype)


def check_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within twice the rounding of one output from the float64 product of some rows."""
    exact = x.double() @ weight[:64].double().T
    torch.testing.assert_close(y[..., :64].double(), exact, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-4 * float(exact.abs().max()))


class Layers:
    """Copies of one layer that take turns, so that no call finds its weight in a cache."""

    def __init__(self, calls: list) -> None:
        self.calls, self.next = calls, 0

    def __call__(self):
        self.next = (self.next + 1) % len(self.calls)
        return self.calls[self.next]()


def copies(weight: torch.Tensor) -> int:
    return max(2, 200_000_000 // weight.nbytes)


def product_case(measure, weight, fmt, against, goal, tokens, generator, name):
    """Times `fmt` on `weight` against `torch.nn.functional.linear`, or our own dense product where `against` says so."""
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.dtype)
    tensors = fmt.pack(weight)
    fmt.check(tensors, tuple(weight.shape), weight.dtype)
    check_product(fmt.linear(x, tensors, tuple(weight.shape)), x, weight)
    turns = copies(weight) if tokens == 1 else 1
    packed = [{key: tensor.clone() for key, tensor in tensors.items()} for _ in range(turns)]
    dense = [weight.clone() for _ in range(turns)]
    ours = Layers([lambda t=t: fmt.linear(x, t, tuple(weight.shape)) for t in packed])
    if against == "our dense bf16":
        gemv = dense_gemv()
        check_product(gemv(x, weight), x, weight)
        theirs = Layers([lambda w=w: gemv(x, w) for w in dense])
    else:
        theirs = Layers([lambda w=w: linear(x, w) for w in dense])
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    group = f"{name}, {tokens} token{'s' * (tokens > 1)}, {weight.shape[0]}x{weight.shape[1]} {str(weight.dtype).removeprefix('torch.')}"
    measure(
        ours, group=f"{group}, against {against}", bytes=nbytes if tokens == 1 else 0, rounds=41 if tokens == 1 else 5,
        against=theirs, baseline=against, settled=tokens == 1, goal=goal, size_of_dense=round(nbytes / weight.nbytes, 4),
    )  # fmt: skip


@SHAPES
@pytest.mark.parametrize("zeros, goal", [(0.5, 2.2), (0.7, 3.0)])
def test_one_token(measure, generator, shape, zeros, goal):
    weight = sparse_weight(shape, zeros, torch.bfloat16, generator)
    product_case(measure, weight, Bitmask(), "F.linear bf16", goal, 1, generator, f"bitmask_linear {zeros:.0%} zeros")


@SHAPES
def test_one_token_against_our_dense_product(measure, generator, shape):
    weight = sparse_weight(shape, 0.5, torch.bfloat16, generator)
    product_case(measure, weight, Bitmask(), "our dense bf16", 1.3, 1, generator, "bitmask_linear 50% zeros")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("tokens", [4, 16, 64, 512])
def test_tokens(measure, generator, tokens, dtype):
    weight = sparse_weight((4096, 4096), 0.5, dtype, generator)
    name = "F.linear bf16" if dtype == torch.bfloat16 else "F.linear f32"
    product_case(measure, weight, Bitmask(), name, 0.9, tokens, generator, "bitmask_linear 50% zeros")
