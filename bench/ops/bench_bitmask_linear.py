from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

import sparsekern
from baselines.dense_gemv import dense_gemv
from sparsekern.runtime.formats import Bitmask
from sparsekern.runtime.packed_format import Format

from ..inputs import short
from ..problem import Case, NotHere, Place, Problem

DENSE, HAND_WRITTEN = "F.linear", "a hand-written dense product"
SHAPES = ((4096, 4096), (11008, 4096))
TOY = {"rows": 128, "columns": 192}


def product(
    place: Place,
    fmt: Format,
    prune: Callable[[Place, torch.Tensor], torch.Tensor],
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """A product with a packed weight; copies of the layer take turns, so that no call finds its weight in a cache."""
    shape = rows, columns
    weight = prune(place, place.randn(rows, columns) / columns**0.5).to(dtype)
    x = place.randn(tokens, columns, dtype=dtype)
    tensors = fmt.pack(weight)
    fmt.check(tensors, shape, dtype)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    packed = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in place.copies(nbytes)]
    dense = [weight.clone() for _ in place.copies(weight.nbytes)]

    def check(result: torch.Tensor) -> None:
        """Within twice the rounding of one output from the float64 product of some tokens."""
        few = slice(0, 64)
        exact = x[few].double() @ weight.double().T
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4 * float(exact.abs().max())}
        torch.testing.assert_close(result[few].double(), exact, **tolerance)

    return Problem(
        calls=[lambda t=t: fmt.linear(x, t, shape) for t in packed],
        check=check,
        baselines={
            DENSE: [lambda w=w: linear(x, w) for w in dense],
            HAND_WRITTEN: [lambda w=w: hand_written(x, w, check) for w in dense],
        },
        flops=2 * tokens * int(weight.count_nonzero()),
        read=nbytes + x.nbytes,
        written=tokens * rows * x.element_size(),
        unit="bf16" if dtype == torch.bfloat16 else "fp32",
    )


def hand_written(x: torch.Tensor, weight: torch.Tensor, check: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The product by `dense_gemv`, which is compiled and checked on its first call."""
    if not torch.cpu._is_avx512_supported():
        raise NotHere("the hand-written dense product needs AVX-512")
    first = dense_gemv.cache_info().currsize == 0
    result = dense_gemv()(x, weight)
    if first:
        check(result)
    return result


def by_isa(goal: float | None, avx2: float | None) -> float | None:
    """Return the goal of the instruction set in use: `avx2`, or that of AVX-512."""
    return avx2 if sparsekern.info().cpu["in use"] == "avx2" else goal


def random_zeros(share: float) -> Callable[[Place, torch.Tensor], torch.Tensor]:
    return lambda place, weight: weight * (place.rand(*weight.shape) >= share)


def case(zeros: float, tokens: int, shape: tuple[int, int], dtype: torch.dtype, cpu, cuda=None) -> Case:
    some = f"{tokens} token{'s' * (tokens > 1)}"
    return Case(
        f"bitmask_linear {zeros:.0%} zeros, {some}, {shape[0]}x{shape[1]} {short(dtype)}",
        product,
        {"fmt": Bitmask(), "prune": random_zeros(zeros), "rows": shape[0], "columns": shape[1], "tokens": tokens, "dtype": dtype},
        TOY | {"tokens": min(tokens, 40)},
        op="bitmask_linear",
        cpu=cpu,
        cuda=cuda,
        rounds=41 if tokens == 1 else 5,
    )


CASES = [
    *(
        case(0.5, 1, shape, torch.bfloat16, {DENSE: by_isa(2.2, avx2=2.0), HAND_WRITTEN: by_isa(1.3, avx2=None)}, {DENSE: 1.0})
        for shape in SHAPES
    ),
    *(case(0.7, 1, shape, torch.bfloat16, {DENSE: by_isa(3.0, avx2=2.8)}) for shape in SHAPES),
    *(case(zeros, 1, SHAPES[0], torch.float32, {DENSE: by_isa(None, avx2=goal)}) for zeros, goal in ((0.5, 1.8), (0.7, 2.8))),
    *(
        case(
            0.5,
            tokens,
            SHAPES[0],
            dtype,
            {DENSE: by_isa(0.9, avx2={4: 1.5, 16: 1.0}.get(tokens, 0.9))},
            {DENSE: None} if tokens in (16, 512) and dtype == torch.bfloat16 else None,
        )
        for tokens in (4, 16, 64, 512)
        for dtype in (torch.bfloat16, torch.float32)
    ),
]


def test_bitmask_linear(timed, case):
    timed(case)
