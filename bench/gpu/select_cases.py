"""The benchmarks of selection and packing, all bound by memory: the floor is the measured bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as pytorch_pack

from sparsekern import ops
from sparsekern.ops.topk_mask import reference as topk_by_sort

from .cases import Place, Problem, Share, case


def weights(place: Place, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, prepare=lambda w: w) -> list[torch.Tensor]:
    bytes_each = rows * columns * dtype.itemsize
    return [prepare(place.randn(rows, columns, dtype=dtype)) for _ in place.copies(bytes_each)]


def sparse(weight: torch.Tensor) -> torch.Tensor:
    return weight.masked_fill(~ops.nm_mask(weight.abs()), 0)


def same(expected: Callable[[], object]) -> Callable[[object], None]:
    """A check that a result, or each tensor of one, is to the bit what `expected` returns."""

    def check(result) -> None:
        wanted = expected()
        pairs = zip(result, wanted, strict=True) if isinstance(result, tuple) else [(result, wanted)]
        for got, want in pairs:
            assert got.dtype == want.dtype and torch.equal(got, want), "not the expected bits"

    return check


def packing_bytes(weight: torch.Tensor) -> int:
    return weight.nbytes + weight.nbytes // 2 + weight.numel() // 8


@case("semi_structured_prune_pack 8192x8192 bf16", "semi_structured_prune_pack")
def prune_pack(place: Place) -> Problem:
    size = place.size(8192, 128)
    given = weights(place, size, size)
    return Problem(
        calls=[lambda w=w: ops.semi_structured_prune_pack(w) for w in given],
        check=same(lambda: pytorch_pack(sparse(given[0]))),
        bytes=packing_bytes(given[0]),
        goals=(Share(0.8),),
    )


@case("nm_mask, masked_fill and semi_structured_pack 8192x8192 bf16")
def mask_and_pack(place: Place) -> Problem:
    size = place.size(8192, 128)
    given = weights(place, size, size)
    pruned = sparse(given[0])
    return Problem(
        calls=[lambda w=w: ops.semi_structured_pack(sparse(w)) for w in given],
        check=same(lambda: pytorch_pack(pruned)),
        baselines={"PyTorch's converter on what is pruned": [lambda: pytorch_pack(pruned)]},
        bytes=packing_bytes(given[0]),
    )


@case("nm_mask 8192x8192 bf16", "nm_mask")
def nm_mask(place: Place) -> Problem:
    size = place.size(8192, 128)
    given = weights(place, size, size)

    def by_topk() -> torch.Tensor:
        groups = given[0].view(-1, 4)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)

    return Problem(
        calls=[lambda w=w: ops.nm_mask(w) for w in given],
        check=same(lambda: topk_by_sort(given[0].view(-1, 4), 2).view(size, size)),
        baselines={"topk and scatter": [by_topk]},
        bytes=given[0].nbytes + given[0].numel(),
    )


@case("semi_structured_pack 8192x8192 bf16", "semi_structured_pack")
def semi_structured_pack(place: Place) -> Problem:
    size = place.size(8192, 128)
    given = weights(place, size, size, prepare=sparse)
    return Problem(
        calls=[lambda w=w: ops.semi_structured_pack(w) for w in given],
        check=same(lambda: pytorch_pack(given[0])),
        baselines={"PyTorch's converter": [lambda: pytorch_pack(given[0])]},
        bytes=packing_bytes(given[0]),
    )


@case("semi_structured_unpack 8192x8192 bf16", "semi_structured_unpack")
def semi_structured_unpack(place: Place) -> Problem:
    size = place.size(8192, 128)
    given = weights(place, size, size, prepare=sparse)
    packed = [ops.semi_structured_pack(w) for w in given]
    return Problem(
        calls=[lambda p=p: ops.semi_structured_unpack(*p) for p in packed],
        check=same(lambda: given[0]),
        bytes=packing_bytes(given[0]),
    )


def by_sort(scores: torch.Tensor, k: int, scope: str) -> torch.Tensor:
    rows = scores.reshape(1, -1) if scope == "matrix" else scores
    order = rows.sort(dim=1, descending=True).indices[:, :k]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def topk(place: Place, scope: str) -> Problem:
    rows, columns = place.size(4096, 64), place.size(11008, 320)
    given = weights(place, rows, columns, torch.float32)
    k = (rows if scope == "matrix" else 1) * columns // 2
    return Problem(
        calls=[lambda w=w: ops.topk_mask(w, k, scope=scope) for w in given],
        check=same(lambda: topk_by_sort(given[0], k, scope=scope)),
        baselines={"sort": [lambda: by_sort(given[0], k, scope)]},
        bytes=given[0].nbytes + given[0].numel(),
    )


@case("topk_mask 4096x11008 fp32 by row", "topk_mask")
def topk_row(place: Place) -> Problem:
    return topk(place, "row")


@case("topk_mask 4096x11008 fp32 of all", "topk_mask")
def topk_matrix(place: Place) -> Problem:
    return topk(place, "matrix")


def half_zero(weight: torch.Tensor) -> torch.Tensor:
    return weight.clamp(min=0)


@case("gram_symmetrize_ 4096", "gram_symmetrize_")
def gram_symmetrize(place: Place) -> Problem:
    size = place.size(4096, 128)
    given = weights(place, size, size, torch.float32)
    lower = given[0].tril()
    return Problem(
        calls=[lambda w=w: ops.gram_symmetrize_(w) for w in given],
        check=same(lambda: lower + lower.tril(-1).T),
        baselines={"tril() + tril(-1).T": [lambda w=w: w.tril() + w.tril(-1).T for w in given]},
        bytes=given[0].nbytes,
    )
