"""The benchmarks of products from packed weights: the floor is the packed bytes, the baseline PyTorch's dense product."""

from __future__ import annotations

import torch
from torch.nn import functional

from sparsekern.runtime.formats import Bitmask, Format, NMPacked

from .cases import Faster, Place, Problem, case
from .select_cases import half_zero, sparse

DENSE = "F.linear bf16"


def product(place: Place, fmt: Format, prune, rows: int, columns: int, tokens: int, goals=()) -> Problem:
    """Copies of one layer take turns, so that no call finds its weight in the L2."""
    shape = rows, columns
    weight = prune(place.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5)
    x = place.randn(tokens, columns, dtype=torch.bfloat16)
    tensors = fmt.pack(weight)
    fmt.check(tensors, shape, weight.dtype)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    packed = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in place.copies(nbytes)]
    dense = [weight.clone() for _ in place.copies(weight.nbytes)]

    def check(result: torch.Tensor) -> None:
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-4 * float(exact.abs().max()))

    return Problem(
        calls=[lambda t=t: fmt.linear(x, t, shape) for t in packed],
        check=check,
        baselines={DENSE: [lambda w=w: functional.linear(x, w) for w in dense]},
        flops=2 * tokens * int(weight.count_nonzero()),
        bytes=nbytes + x.nbytes + tokens * rows * x.element_size(),
        unit="bf16",
        goals=goals,
    )


@case("bitmask_linear, 1 token, 11008x4096 bf16, half zero", "bitmask_linear")
def bitmask_decode(place: Place) -> Problem:
    return product(place, Bitmask(), half_zero, place.size(11008, 128), place.size(4096, 192), 1, (Faster(1.0, DENSE),))


@case("nm_linear, 1 token, 11008x4096 bf16, 2:4", "nm_linear")
def nm_decode(place: Place) -> Problem:
    return product(place, NMPacked(2, 4), sparse, place.size(11008, 128), place.size(4096, 192), 1, (Faster(1.0, DENSE),))


@case("bitmask_linear, 1 token, 4096x4096 bf16, half zero", "bitmask_linear")
def bitmask_decode_square(place: Place) -> Problem:
    return product(place, Bitmask(), half_zero, place.size(4096, 128), place.size(4096, 192), 1)


@case("bitmask_linear, 16 tokens, 4096x4096 bf16, half zero", "bitmask_linear")
def bitmask_few(place: Place) -> Problem:
    return product(place, Bitmask(), half_zero, place.size(4096, 128), place.size(4096, 192), 16)


@case("nm_linear, 16 tokens, 4096x4096 bf16, 2:4", "nm_linear")
def nm_few(place: Place) -> Problem:
    return product(place, NMPacked(2, 4), sparse, place.size(4096, 128), place.size(4096, 192), 16)


@case("bitmask_linear, 512 tokens, 4096x4096 bf16, half zero", "bitmask_linear")
def bitmask_many(place: Place) -> Problem:
    return product(place, Bitmask(), half_zero, place.size(4096, 128), place.size(4096, 192), place.size(512, 40))


@case("nm_linear, 512 tokens, 4096x4096 bf16, 2:4", "nm_linear")
def nm_many(place: Place) -> Problem:
    return product(place, NMPacked(2, 4), sparse, place.size(4096, 128), place.size(4096, 192), place.size(512, 40))
